"""Downloads models from the Hugging Face hub through the optional package huggingface_hub."""

# 从 Hugging Face hub 取模型（init_from=owner/name）：只挑形状、权重与词表，代码从不下载
# 缓存、镜像（HF_ENDPOINT）、断网（HF_HUB_OFFLINE）都交给 huggingface_hub；这里把它的各种错误变成一行
# hub 上的权重没有事先知道的 SHA-256，路上不被改动全靠 TLS：镜像必须是 https
# 取到的只是一个本机文件夹，之后与自己放的文件夹一样由 pretrained.read_folder 读

from pathlib import Path
from urllib.parse import urlsplit

from nanogpt.base.language import ConfigError, say
from nanogpt.data.assets import without_password
from nanogpt.weights.foreign_files import WEIGHTS, shard_names

# 只取形状、权重与词表；仓库里的代码从不下载
TOKENIZER = ("tokenizer.json", "tokenizer_config.json", "vocab.json", "merges.txt", "vocab.txt")


def download(name: str, named: str, key: str) -> Path:
    """The local folder of hub model `name`, downloaded if not cached; `named` is what the user typed for `key`."""
    try:
        import huggingface_hub
        from huggingface_hub import constants
    except ImportError:
        raise ConfigError(
            "{key}={got}: there is no such folder here, and the hub needs the package huggingface_hub (pip install "
            "huggingface_hub; HF_ENDPOINT names a mirror); or give a local folder: {key}=FOLDER with config.json and "
            "model.safetensors",
            key=key, got=named,
        ) from None
    parts = urlsplit(constants.ENDPOINT)
    if parts.scheme != "https" and parts.hostname not in ("localhost", "127.0.0.1"):
        # 这里没有事先知道的 SHA-256：路上不被改动全靠 TLS
        raise ConfigError(
            "{key}={got}: HF_ENDPOINT={endpoint} is not https, and weights have no hash known beforehand; name a "
            "mirror with https, or give a local folder: {key}=FOLDER",
            key=key, got=named, endpoint=without_password(constants.ENDPOINT),
        )
    # 断网时库自己会反复重试并打印警告，下面的一行已说明一切
    huggingface_hub.logging.set_verbosity_error()
    say("fetching", name=name, place=without_password(constants.ENDPOINT))
    try:
        folder = Path(huggingface_hub.hf_hub_download(name, "config.json")).parent
        weights = next((file for file in WEIGHTS if _optional(huggingface_hub, name, file)), None)
        if weights is None:
            raise FileNotFoundError("no " + " or ".join(WEIGHTS))
        if weights.endswith(".index.json"):
            for file in shard_names(folder / weights):
                huggingface_hub.hf_hub_download(name, file)
        for file in TOKENIZER:
            _optional(huggingface_hub, name, file)
    except ConfigError:
        raise
    except Exception as error:
        # 网络库的错误类型随版本变，但都意味着没有取到；连不上时起因比外层的套话有用
        offline = isinstance(error, huggingface_hub.errors.LocalEntryNotFoundError)
        cause = (error.__cause__ or error) if offline else error
        reason = " ".join(str(cause).split())[:160] or type(cause).__name__
        raise ConfigError(
            "{key}={got}: there is no such folder here, and {endpoint} did not give it ({reason}); check the name and "
            "the network, set the environment variable HF_ENDPOINT to a mirror, or give a local folder: {key}=FOLDER "
            "with config.json and model.safetensors",
            key=key, got=named, endpoint=without_password(constants.ENDPOINT), reason=reason,
        ) from None
    return folder


def _optional(huggingface_hub, name: str, file: str) -> bool:
    """Fetch a file that the repository may lack; False when it does."""
    try:
        huggingface_hub.hf_hub_download(name, file)
        return True
    except huggingface_hub.errors.LocalEntryNotFoundError:
        # 断网：缓存记得仓库里没有这个文件，才能当作没有
        if isinstance(huggingface_hub.try_to_load_from_cache(name, file), str | None):
            raise
        return False
    except huggingface_hub.errors.EntryNotFoundError:
        return False
