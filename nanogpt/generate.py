"""The decode loop: prompt in, tokens out, one at a time."""

from collections.abc import Callable, Iterator

import torch

from nanogpt.attention import KVCache


def sample_tempered(logits: torch.Tensor, temperature: float, generator: torch.Generator) -> torch.Tensor:
    """One id per row of logits (B, V), shape (B,); temperature 0 takes the most likely."""
    if temperature == 0:
        return logits.argmax(dim=-1)
    probabilities = torch.softmax(logits.float() / temperature, dim=-1)
    return torch.multinomial(probabilities, 1, generator=generator)[:, 0]


@torch.no_grad()
def generate(model, idx: torch.Tensor, max_new_tokens: int, choose: Callable[[torch.Tensor], torch.Tensor]) -> Iterator[torch.Tensor]:
    """Yield max_new_tokens times the next ids (B,), after the prompt idx (B, T).

    choose maps logits (B, V) to ids (B,). When the context is full, its newer half is read again
    from position 0 and the older half forgotten.
    """
    block = model.config.block_size
    history = idx[:, -block:]
    cache = KVCache(model, idx.size(0))
    fresh = history
    for _ in range(max_new_tokens):
        if cache.length + fresh.size(1) > block:
            # 位置用完：丢掉较旧的一半重读，摊到每个 token 的代价是常数
            history = history[:, -(block // 2 or 1) :]
            cache.length = 0
            fresh = history
        logits = model.logits(model.hidden(fresh, cache)[:, -1])
        chosen = choose(logits)
        yield chosen
        fresh = chosen[:, None]
        history = torch.cat((history, fresh), dim=1)


def write_sample(model, tokenizer, prompt: str, max_new_tokens: int, *, temperature: float, seed: int) -> str:
    """A text of max_new_tokens tokens behind the prompt; leaves the global generators as they were."""
    device = model.wte.weight.device
    # 独立的随机源：写样本与否不影响训练结果
    generator = torch.Generator(device=device).manual_seed(seed)
    idx = torch.tensor(tokenizer.encode(prompt), device=device)[None]
    was_training = model.training
    model.eval()
    steps = generate(model, idx, max_new_tokens, lambda logits: sample_tempered(logits, temperature, generator))
    ids = [int(chosen) for chosen in steps]
    model.train(was_training)
    return prompt + tokenizer.decode(ids)
