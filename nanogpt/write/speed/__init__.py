"""Make decoding faster: number formats, weight layouts, and compiled or recorded decoding steps."""

# 写作的加速：acceleration 按机器选一条最快的路
# int8 是 8 位权重，fast_cpu 是 CPU 上编译成一个函数的一步，cuda_graph 是显卡上录下来的一步
# 都从外面套在模型上，core 里的模型不知道它们；fast=false 时一个也不用，结果与它们只差舍入
