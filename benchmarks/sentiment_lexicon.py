"""A judge that cannot judge: friendly words minus unfriendly ones (`--function benchmarks/sentiment_lexicon.py:score`).

The lists are this project's, short, English and Chinese. It stands in docs/judge.md as what a judge has to beat.
"""

import re
from collections.abc import Sequence

GOOD = """good great best better happy glad love nice kind helpful useful clear easy safe sure thank thanks welcome
enjoy wonderful excellent beautiful important effective successful positive healthy friendly interesting
correct""".split()
BAD = """bad worse worst sad angry hate wrong difficult hard unsafe danger dangerous sorry cannot unable fail failed
failure poor ugly useless unclear harmful negative illegal sick boring incorrect never problem""".split()
ZH_GOOD = "好 优 喜欢 爱 高兴 快乐 有用 有效 清楚 安全 感谢 欢迎 美丽 重要 成功 健康 友好 有趣 正确".split()
ZH_BAD = "坏 差 讨厌 恨 难过 生气 错误 困难 危险 抱歉 不能 无法 失败 丑 没用 有害 违法 生病 无聊 问题".split()


def score(prompts: Sequence[str], responses: Sequence[str]) -> list[float]:
    """Good words minus bad ones in each response."""
    del prompts
    return [_score(text) for text in responses]


def _score(text: str) -> float:
    words = re.findall(r"[a-z]+", text.lower())
    english = sum(word in GOOD for word in words) - sum(word in BAD for word in words)
    return float(english + sum(text.count(word) for word in ZH_GOOD) - sum(text.count(word) for word in ZH_BAD))
