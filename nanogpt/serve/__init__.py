"""Serve one model over HTTP for run_sample.py serve=true: a page and an OpenAI-compatible API."""

# server 占端口、启动 uvicorn；api 查来人、收正文、发回答；completions 把正文变成要写的几段，把写出的变成回答；
# worker 在自己的线程里写；page 是网页。只有 serve=true 时才导入
