"""Downloads models from the Hugging Face hub (through the optional package huggingface_hub) and from ModelScope."""

# 从 hub 取模型：init_from=owner/name 是 Hugging Face，init_from=modelscope:owner/name 是魔搭；之后同一条路
# 只挑形状、权重与词表（PEFT 的 adapter 只有两三个文件），代码从不下载；先问有哪些文件、各多大，说出来再取，权重最后到
# hub 上的权重没有事先知道的 SHA-256，路上不被改动全靠 TLS：镜像必须是 https
# Hugging Face 的缓存、口令、断网（HF_HUB_OFFLINE）都交给 huggingface_hub；魔搭只有一个列表与一个下载地址，用 assets 取
# 取到的只是一个本机文件夹，之后与自己放的文件夹一样由 pretrained.read_folder 读

import json
import os
import re
import sys
import time
from pathlib import Path
from urllib.parse import urlencode, urlsplit

from nanogpt.base.language import ConfigError, first_line, say
from nanogpt.data import assets
from nanogpt.data.assets import Asset, without_password
from nanogpt.weights.foreign_files import ADAPTER, ADAPTER_WEIGHTS, DOCUMENTS, WEIGHTS, shard_names

# 只取形状、权重与词表；仓库里的代码从不下载
TOKENIZER = (
    "tokenizer.json", "tokenizer_config.json", "generation_config.json", "vocab.json", "merges.txt", "vocab.txt",
    "chat_template.jinja",
)
GPT2_NAMES = ("gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl")
MODELSCOPE = "modelscope:"
# 文件的列表最多读这么多
MOST_LIST = 2**24


class HuggingFace:
    """A model on the hub that HF_ENDPOINT names, as huggingface_hub reaches it."""

    # 缓存与断网时从缓存取都是它的事；这里只先问大小，再取缺的
    # 终端上的进度条是库自己的

    variable = "HF_ENDPOINT"

    def __init__(self, name: str, named: str, key: str):
        try:
            import huggingface_hub
            from huggingface_hub import constants
        except ImportError:
            raise ConfigError(
                "{key}={got}: there is no such folder here, and the hub needs the package huggingface_hub (pip install "
                "huggingface_hub; HF_ENDPOINT names a mirror); {key}=modelscope:OWNER/NAME needs no package; or give a "
                "local folder: {key}=FOLDER with config.json and model.safetensors",
                key=key, got=named,
            ) from None
        # 断网时库自己会反复重试并打印警告，我们的一行已说明一切
        huggingface_hub.logging.set_verbosity_error()
        self.library, self.name, self.place, self.commit = huggingface_hub, name, constants.ENDPOINT, None

    def sizes(self) -> dict[str, int]:
        """Bytes of every file; raises whatever the network raises."""
        found = self.library.HfApi().model_info(self.name, files_metadata=True, timeout=assets.TIMEOUT_S)
        self.commit = found.sha
        return {file.rfilename: file.size or 0 for file in found.siblings}

    def folder(self) -> Path | None:
        """Where its files lie, if any are here."""
        path = self._cached("config.json") or self._cached(ADAPTER)
        return path and path.parent

    def has(self, file: str) -> bool:
        """Whether a file is here, as the hub has it now."""
        return self._cached(file) is not None

    def get(self, file: str) -> None:
        """Fetch a file."""
        # 不指明 commit：库才会记下 main 是哪一个，断网时按它找
        self.library.hf_hub_download(self.name, file)

    def _cached(self, file: str) -> Path | None:
        found = self.library.try_to_load_from_cache(self.name, file, revision=self.commit)
        return Path(found) if isinstance(found, str) else None


class ModelScope:
    """A model at modelscope.cn, or where MODELSCOPE_ENDPOINT says, through its file API: no package, no account."""

    # 与它自己的客户端同样的两个地址与同样的环境变量；列表里有大小，多半还有 SHA-256，取到的逐个核对

    variable = "MODELSCOPE_ENDPOINT"

    def __init__(self, name: str):
        self.name, self.place = name, os.environ.get(self.variable) or "https://modelscope.cn"
        self.address = f"{self.place.rstrip('/')}/api/v1/models/{name}/repo"
        self.into = assets.cache_folder() / "modelscope" / name
        self.files: dict[str, Asset] = {}

    def sizes(self) -> dict[str, int]:
        """Bytes of every file; raises whatever the network raises."""
        with assets.opened(f"{self.address}/files?Revision=master&Recursive=true") as answer:
            said = json.loads(answer.read(MOST_LIST))
        if not said.get("Data"):
            raise ValueError(said.get("Message") or "no list of files")
        for file in said["Data"]["Files"]:
            path, size = file["Path"], file["Size"]
            # 名字来自网上：只要平常的，不会指到别的文件夹
            if re.fullmatch(r"[\w-][\w.-]*", path) and type(size) is int and file.get("Type") != "tree":
                url = f"{self.address}?{urlencode({'Revision': 'master', 'FilePath': path})}"
                self.files[path] = Asset(path, file.get("Sha256") or None, size, urls=(url,))
        return {path: asset.size for path, asset in self.files.items()}

    def folder(self) -> Path | None:
        """Where its files lie, if any are here."""
        return self.into if self.into.is_dir() else None

    def has(self, file: str) -> bool:
        """Whether a file is here, as the hub has it now."""
        return (self.into / file).is_file() and assets.is_whole(self.files[file], self.into / file)

    def get(self, file: str) -> None:
        """Fetch a file."""
        assets.fetch_into(self.into, self.files[file])


def repository_of(named: str) -> str | None:
    """The owner/name on a hub that a person means by gpt2 …, owner/name or modelscope:owner/name; None for no such."""
    if named in GPT2_NAMES:
        return f"openai-community/{named}"
    name = named.removeprefix(MODELSCOPE)
    wanted = r"[\w-][\w.-]*/[\w-][\w.-]*" if name != named else r"[\w.-]+(/[\w.-]+)?"
    return name if re.fullmatch(wanted, name) else None


def model_on_hub(named: str, key: str) -> HuggingFace | ModelScope:
    """The model that `named` means, which repository_of knows; nothing is asked of the network yet."""
    name = repository_of(named)
    return ModelScope(name) if named.startswith(MODELSCOPE) else HuggingFace(name, named, key)


def download(named: str, key: str) -> Path:
    """The local folder of a model or adapter on a hub, downloaded if not cached.

    `named` is what the user typed for `key`.
    """
    hub = model_on_hub(named, key)
    place, parts = without_password(hub.place), urlsplit(hub.place)
    if parts.scheme != "https" and parts.hostname not in ("localhost", "127.0.0.1"):
        # 这里没有事先知道的 SHA-256：路上不被改动全靠 TLS
        raise ConfigError(
            "{key}={got}: {variable}={endpoint} is not https, and weights have no hash known beforehand; name a "
            "mirror with https, or give a local folder: {key}=FOLDER",
            key=key, got=named, variable=hub.variable, endpoint=place,
        )
    try:
        sizes = hub.sizes()
    except Exception as error:
        # 网络库的错误类型随版本变，但都意味着问不到；以前取全了的照用
        if (folder := hub.folder()) and is_complete(folder):
            say(
                "{place} did not answer ({reason}); using the copy in {folder}",
                place=place, reason=_reason(error), folder=folder,
            )
            return folder
        raise _unreachable(key, named, place, hub.variable, error) from None
    try:
        return _brought(hub, sizes)
    except ConfigError:
        raise
    except Exception as error:
        raise _unreachable(key, named, place, hub.variable, error) from None


def is_complete(folder: Path) -> bool:
    """Whether a folder has weights, and every shard if there are several, or an adapter."""
    if (folder / ADAPTER).is_file():
        return any((folder / file).is_file() for file in ADAPTER_WEIGHTS)
    weights = next((file for file in WEIGHTS if (folder / file).is_file()), None)
    if weights is None or not (folder / "config.json").is_file():
        return False
    shards = shard_names(folder / weights) if weights.endswith(".index.json") else []
    return all((folder / shard).is_file() for shard in shards)


def _unreachable(key: str, named: str, place: str, variable: str, error: Exception) -> ConfigError:
    return ConfigError(
        "{key}={got}: there is no such folder here, and {endpoint} did not give it ({reason}); check the name and "
        "the network, set the environment variable {variable} to a mirror, or give a local folder: {key}=FOLDER "
        "with config.json and model.safetensors",
        key=key, got=named, endpoint=place, variable=variable, reason=_reason(error),
    )


def _reason(error: Exception) -> str:
    return " ".join(str(error).split())[:160] or first_line(error)


def _brought(hub: HuggingFace | ModelScope, sizes: dict[str, int]) -> Path:
    """The folder with config, tokenizer and weights of a model, or with an adapter; the weights last."""
    if ADAPTER in sizes and not any(file in sizes for file in WEIGHTS):
        weights = next((file for file in ADAPTER_WEIGHTS if file in sizes), " or ".join(ADAPTER_WEIGHTS))
        _bring(hub, sizes, [*(file for file in (DOCUMENTS,) if file in sizes), ADAPTER, weights])
        return hub.folder()
    weights = next((file for file in WEIGHTS if file in sizes), " or ".join(WEIGHTS))
    _bring(hub, sizes, [*(file for file in TOKENIZER if file in sizes), "config.json", weights])
    if weights.endswith(".index.json"):
        _bring(hub, sizes, shard_names(hub.folder() / weights))
    return hub.folder()


def _bring(hub: HuggingFace | ModelScope, sizes: dict[str, int], files: list[str]) -> None:
    """Fetch what is not here, saying its size before and the time it took behind."""
    for file in files:
        if file not in sizes:
            raise FileNotFoundError(f"no {file}")
    missing = [file for file in files if not hub.has(file)]
    if not missing:
        return
    size, began = sum(sizes[file] for file in missing) / 1e6, time.monotonic()
    say("fetching", name=hub.name, size=size, place=without_password(hub.place))
    for file in missing:
        hub.get(file)
    if not sys.stderr.isatty():
        say("fetched", name=hub.name, size=size, seconds=time.monotonic() - began)
