"""Write texts with a trained model: one or many prompts, interactively, led by style and emotion."""

# 写作：从配置到文字
# loading 载入模型，request 是一段文字的要求与结果，engine 里的 Writer 把许多段一起写；
# samples 是一次写几段，commands 与 terminal 是一问一答
# control/ 是风格与情绪，speed/ 让每一步更快，judge/ 评估控制灵不灵
