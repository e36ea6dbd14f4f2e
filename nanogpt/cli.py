"""Between the command line and the run scripts: compose with Hydra, turn mistakes into one line."""

import difflib
import os
import re
import sys
from collections.abc import Callable

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.errors import ConfigCompositionException, HydraException, InstantiationException, MissingConfigException, OverrideParseException
from hydra.types import RunMode
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from nanogpt.config import ROOT, TrainConfig, register_schemas
from nanogpt.messages import ConfigError, language_from_arguments, say, set_language

EXIT_USER_ERROR = 2


def known_keys() -> list[str]:
    """All dotted keys of the typed schema."""

    def walk(node, prefix):
        for key, value in node.items():
            yield prefix + key
            if isinstance(value, dict):
                yield from walk(value, f"{prefix}{key}.")

    container = OmegaConf.to_container(OmegaConf.structured(TrainConfig), throw_on_missing=False)
    return list(walk(container, ""))


def one_line(error: Exception, config_name: str) -> ConfigError:
    """Turn what Hydra or OmegaConf raised while composing into a ConfigError that names the key."""
    message = str(error)
    if isinstance(error, MissingConfigException) and error.options:
        group, _, got = (error.missing_cfg_file or "").rpartition("/")
        return ConfigError("unknown_option", group=group, got=got, options=", ".join(error.options))
    cause = error.__cause__ if isinstance(error.__cause__, OmegaConfBaseException) else error
    if isinstance(cause, OmegaConfBaseException) and cause.full_key and "could not be converted" in str(cause):
        want = re.search(r"could not be converted to (\w+)", str(cause))
        return ConfigError("wrong_type", key=cause.full_key, got=cause.value, want=want[1] if want else "?")
    unknown = re.search(r"Could not (?:override|append|delete)[^']*'([^'=@]+)", message)
    if unknown:
        key = unknown[1]
        close = difflib.get_close_matches(key, known_keys(), n=1)
        from nanogpt.messages import text

        guess = text("did_you_mean", guess=close[0]) if close else ""
        return ConfigError("unknown_key", key=key, guess=guess, config=config_name)
    # 其余情形：第一行足以说明问题，后面是 Hydra 的内部细节
    return ConfigError("compose", line=" ".join(line.strip() for line in message.splitlines() if line.strip()))


def unwrap(error: InstantiationException) -> ConfigError:
    """The user's mistake inside an `_target_` that could not be built."""
    cause = error.__cause__ or error
    key = re.search(r"full_key: (\S+)", str(error))
    return ConfigError("bad_part", key=key[1] if key else "_target_", reason=str(cause).splitlines()[0])


def run_script(config_name: str, task: Callable[[TrainConfig, list[str]], None]) -> None:
    """Compose conf/<config_name>.yaml with the command line and call task(cfg, overrides); exit 2 on a mistake."""
    # 重定向到 GBK 终端时，打不出的字符用 ? 代替，而不是崩溃
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(errors="replace")
    set_language(language_from_arguments(sys.argv))
    register_schemas()
    # 让 Hydra 把异常原样抛出，由下面统一压成一行
    os.environ["HYDRA_FULL_ERROR"] = "1"
    reported: list[Exception] = []

    def job(cfg):
        overrides = list(HydraConfig.get().overrides.task)
        try:
            set_language(cfg.lang if cfg.lang in ("zh", "en") else "auto")
            task(OmegaConf.to_object(cfg), overrides)
        except (ConfigError, InstantiationException, OmegaConfBaseException) as error:
            line = error if isinstance(error, ConfigError) else unwrap(error) if isinstance(error, InstantiationException) else one_line(error, config_name)
            say("error", line=line)
            reported.append(error)
            # 多任务时只算这一个失败，其余照跑；单任务直接退出
            if HydraConfig.get().mode == RunMode.MULTIRUN:
                raise
            sys.exit(EXIT_USER_ERROR)

    try:
        hydra.main(version_base="1.3", config_path=str(ROOT / "conf"), config_name=config_name)(job)()
    except (HydraException, ConfigCompositionException, OverrideParseException, OmegaConfBaseException, ConfigError) as error:
        if error not in reported:
            say("error", line=one_line(error, config_name))
        sys.exit(EXIT_USER_ERROR)
