"""Train a model in a run folder: the loop, its checkpoints and metrics, and the watch over its health."""

# 训练：一个 run 目录里从开始到结束的一切
# session 把各部分拼起来，loop 是训练循环，saving 管存与续，health 看它还有没有意义，rundir 管目录与续训的配置，
# metrics 量速度与内存，loggers 写曲线，summary 写总结
# 选微批、解释显存不足、写样本这几样在上层，由 run_train.py 递进来
