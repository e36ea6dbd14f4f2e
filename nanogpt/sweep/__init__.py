"""Try many settings, every one in a child process: which is the fastest that fits, and which learns most."""

# 扫描：把许多设置各试跑几步，量出速度与显存，排出最快又放得下的；或者各做一次短训练，排出学得最好的
# jobs 是 Hydra 那边的入口；trial 管一次试跑，process 管子进程，child 是子进程里做的事；result 是结果的形状；
# spill 认出溢到内存的成功，earlier_results 记住测过的，report 与 chart 写报告；auto_batch 是 batch_size=auto
# learning 是子进程里的短训练，learning_report 写它们的报告，extrapolation 估计训得更久会怎样
# search 是 experiment=search：space 读搜索空间，halving 是逐级减半的循环
