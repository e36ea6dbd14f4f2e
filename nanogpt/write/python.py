# import nanogpt 之后的 load(run).write(...)：与 run_sample.py 同一条路，只是不经命令行
# 键的写法与命令行一样，因为范围、默认值与报错都在那里；载入一次，可写多次
"""Writing from Python: load(run).write(prompt)."""

import dataclasses

from nanogpt.base.groups import sample_config
from nanogpt.base.quoting import override, quoted
from nanogpt.base.run_names import locate, names_run
from nanogpt.base.sample_config import check_sample
from nanogpt.base.value_checks import refuse_keys
from nanogpt.write.loading import Model, open_model, prompt_list, refuse_unread, take_defaults
from nanogpt.write.samples import requests_of

# 只对命令行有意义的，与载入之后改不了的：悄悄不理会，人会以为起了作用
COMMAND = ("interactive", "serve", "starts", "prompts", "output", "num_samples")
LOADED = (
    "out_dir", "init_from", "checkpoint", "device", "precision", "block_size", "threads", "fast", "speculate", "model",
)


def load(run: str = "latest", *overrides: str) -> "Loaded":
    """A trained run, or pretrained weights (gpt2, a folder, owner/name), ready to write.

    Overrides are keys of conf/sample.yaml as they are typed: load("outputs/my-run", "precision=int8", "device=cpu").
    ConfigError says in one line what is wrong.
    """
    named = override("out_dir" if names_run(run) else "init_from", run)
    typed = [quoted(one) for one in (named, *overrides)]
    refuse_keys(overrides, COMMAND, "python_command")
    cfg = sample_config(typed)
    check_sample(cfg)
    run_dir = None if cfg.init_from else locate(cfg.out_dir, key="out_dir")
    return Loaded(open_model(cfg, run_dir, typed), typed)


@dataclasses.dataclass(frozen=True)
class Loaded:
    """A model that writes, and what was typed to load it."""

    # network 与 tokenizer 在 model 里：要自己写解码循环的人从那里取
    model: Model
    overrides: list[str]

    def write(self, prompt: str | None = None, *overrides: str) -> str:
        """The text behind a prompt, with chat=true the answer to a question; None: what start= says, as the command.
        The same seed gives the same text.

        Overrides are keys of conf/sample.yaml: write("KING:", "max_new_tokens=100", "sampler=top_p", "seed=7").
        """
        refuse_keys(overrides, COMMAND, "python_command")
        refuse_keys(overrides, LOADED, "python_loaded")
        if prompt is not None:
            refuse_keys(overrides, ("start",), "python_prompt")
        typed = [*self.overrides, *map(quoted, overrides)]
        cfg = sample_config(typed)
        check_sample(cfg)
        refuse_unread(cfg, typed)
        take_defaults(cfg, self.model.tokenizer, typed, quiet=True)
        if prompt is None:
            prompt = prompt_list(cfg, self.model.default_prompt)[0]
        writer = self.model.writer_of(requests_of(cfg, self.model, [(prompt, 0)]), batch_size=1, skip="unknown=skip")
        return "".join(piece.text for piece in writer.write())
