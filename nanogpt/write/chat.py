"""Writing answers: a conversation as a request to the Writer, in the chat template of the model."""

# chat=true 与 /v1/chat/completions：对话按模型的模板变成 ids，写到这一句的结尾为止；抽字的循环与续写的同一个
# Chat 把一段对话变成 Request；一次写（samples）、一问一答（chat_session）、服务器（serve）都用它
# 说得太长时忘掉最早的一问一答，system 与最后一问总在

from dataclasses import replace

from nanogpt.base.language import ConfigError
from nanogpt.base.value_checks import unescaped
from nanogpt.data.chat import Message, question_ids, turn_end, written_with
from nanogpt.data.tokenizer import UnknownCharacters
from nanogpt.write.loading import Model, Settings
from nanogpt.write.request import Request


class Chat:
    """A model that answers, and what it is told before everything else (`system`)."""

    # 模板在这里就试一次：不能用的，载入之后马上说

    def __init__(self, model: Model, system: str | None = None):
        self.model, self.system = model, unescaped(system or "")
        if model.tokenizer.chat_template is None:
            raise ConfigError(
                "chat=true: {model} has no chat template, for it was not trained on conversations; train with "
                "dataset=chat dataset.path=my.jsonl, or leave out chat=true and it goes on with a text",
                model=model.name,
            )
        self.end = turn_end(model.tokenizer)

    def request(
        self, settings: Settings, messages: list[Message], number: int = 0, *, forget: bool = False,
        skip: str | None = None,
    ) -> Request:
        """The request for the number-th answer to the last message.

        A conversation longer than the context is an error, or, with `forget`, loses its oldest exchanges. `skip` is
        what a person would type to have unknown characters passed over.
        """
        if self.system and messages[0]["role"] != "system":
            messages = [{"role": "system", "content": self.system}, *messages]
        if settings.unknown == "skip":
            asked, messages = messages[-1]["content"], written_with(self.model.tokenizer, messages)
            if asked and not messages[-1]["content"]:
                # 悄悄当作空的来问，会让人以为问到了
                raise ConfigError("prompt_all_skipped", got=asked)
        block = self.model.network.config.block_size
        # 留出回答的位置，但至多一半：max_new_tokens 常比上下文还长
        room = block - min(settings.max_new_tokens, block // 2) if forget else block
        head = messages[0]["role"] == "system"
        try:
            ids = question_ids(self.model.tokenizer, messages)
            while forget and len(ids) > room and len(messages) > head + 2:
                messages = [*messages[:head], *messages[head + 2 :]]
                ids = question_ids(self.model.tokenizer, messages)
        except UnknownCharacters as error:
            unknown = UnknownCharacters(error.characters, skip)
            asked = "".join(message["content"] for message in messages[head:])
            if self.system and not {*error.characters} & {*asked}:
                # 问题里没有这些字：不说是 system 里的，就无从改起
                raise ConfigError("bad_part", key="system", reason=unknown) from None
            raise unknown from None
        if len(ids) > block:
            raise ConfigError("chat_too_long", got=len(ids), limit=block)
        return replace(
            settings.request("", number), prompt=messages[-1]["content"], ids=tuple(ids.tolist()), ends=(self.end,),
            control=None,
        )
