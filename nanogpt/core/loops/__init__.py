"""Loops compiled with numba (extra `fast`): what PyTorch does in a string of small operations, in one pass."""

# 用 numba 编译的循环：compiled 管编译与缓存，team 让 PyTorch 自己的线程一起跑，numbers 读写 bf16
# training 是一步训练里的那些小运算；写作的在 write/speed
# 没有装 numba 时一个也不用，结果只差舍入
