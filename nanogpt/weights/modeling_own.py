"""Wraps a user's own model class for transformers; needs the nanogpt package, on which the class is built.

`nanogpt export` copies this file beside the weights, with the class in place of GPT. It keeps no
key/value cache: every new token reads the whole context again.
"""

# 自己的模型类导出后的外壳：导出时把下面导入 GPT 的那一行换成自己的类，与权重放在一起
# 对方机器上要装 nanogpt，因为自己的类建在它上面；别的架构用 modeling_nanogpt.py，不必装
# 自己的层不认填充，所以有填充时一行一行地算；没有 KV 缓存

import torch
import torch.nn.functional as F
from transformers import GenerationMixin, PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutput

from nanogpt.base.config import ModelConfig
from nanogpt.core.model import GPT


class OwnConfig(PretrainedConfig):
    """Holds the fields of a nanogpt.base.config.ModelConfig in `shape`."""

    # 自己的类要哪些键不知道：ModelConfig（含 extra）整个存下

    model_type = "nanogpt_own"
    keys_to_ignore_at_inference = ()

    def __init__(self, shape=None, **others):
        self.shape = shape or {}
        sizes = ModelConfig(**self.shape)
        # transformers 的通用代码用这几个名字
        self.vocab_size, self.hidden_size = sizes.vocab_size or 1, sizes.n_embd
        self.max_position_embeddings, self.num_hidden_layers = sizes.block_size, sizes.n_layer
        super().__init__(**{**others, "use_cache": False, "tie_word_embeddings": False})


class OwnForCausalLM(PreTrainedModel, GenerationMixin):
    """The user's own class as `model`, with its parameter names under that name."""

    # 包一层而不是改写：类怎样训练的，就怎样算

    config_class = OwnConfig
    main_input_name = "input_ids"

    def __init__(self, config):
        super().__init__(config)
        # transformers 在 meta 设备上造模型，载入时又换掉不在文件里的表（RoPE）：真的造出来，另留一份
        with torch.device("cpu"):
            # 导出时，这里的 GPT 换成自己的类
            self.model = GPT(ModelConfig(**config.shape))
        saved = self.model.state_dict()
        self.tables = {name: table.clone() for name, table in self.model.named_buffers() if name not in saved}
        self.post_init()

    def _init_weights(self, module):
        """Nothing: every weight is in the file."""

    def get_input_embeddings(self):
        return self.model.wte

    def forward(self, input_ids=None, attention_mask=None, labels=None, **unused):
        """Logits (B, T, V) and, with labels (B, T), the mean loss of predicting labels[:, t + 1] at t.

        attention_mask (B, T) is 0 at padding, which belongs on the left.
        """
        # 第一次前向时放回，只做一次
        for name in list(self.tables):
            self.model.get_buffer(name).copy_(self.tables.pop(name))
        if attention_mask is None or bool(attention_mask.all()):
            logits = self.model(input_ids)
        else:
            # 自己的层不认填充：每行去掉左边的填充单独算
            rows = [self.model(ids[mask.bool()][None])[0] for ids, mask in zip(input_ids, attention_mask)]
            logits = torch.stack([F.pad(row, (0, 0, input_ids.size(1) - len(row), 0)) for row in rows])
        loss = None
        if labels is not None:
            loss = F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), labels[:, 1:].flatten())
        return CausalLMOutput(loss=loss, logits=logits)

    def prepare_inputs_for_generation(self, input_ids, attention_mask=None, **unused):
        """Pass on the newest block_size tokens; older ones are forgotten."""
        newest = slice(-self.config.max_position_embeddings, None)
        mask = None if attention_mask is None else attention_mask[:, newest]
        return {"input_ids": input_ids[:, newest], "attention_mask": mask}
