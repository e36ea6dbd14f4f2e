"""Predict how much memory a training takes and how fast it is, before anything is run."""

# 规划：不训练也不占显存，就说出一个设置放不放得下、跑多快、放不下时改什么
# trace 用没有存储的张量走一遍真的训练步，allocator 重放它的分配，roofline 把运算量换成时间，plan 合成一份 Plan；
# show、advice、matrix、autopsy 把结果说给人听；sweep 的试跑也先问它
