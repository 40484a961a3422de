"""Makes the traces of this folder: `python3 make.py`. Times are drawn, with fixed seeds."""

import random

QWEN = ("qwen-7b", 4700, 2.8)
LLAMA = ("llama-8b", 5000, 3.0)
BIG = ("qwen-14b", 9000, 5.5)
CODER = ("coder-1.5b", 1100, 0.8)
EMBED = ("embed", 320, 0.3)


def write(name, what, budget, models, lines):
    with open(name, "w") as out:
        out.write(f"# {what}\nbudget {budget}\n")
        for model, mib, load in models:
            out.write(f"model {model} {mib} {load}\n")
        for when, caller, model, answer in lines:
            out.write(f"{when} {caller} {model} {answer:.1f}\n")


def clamp(value, low, high):
    return max(low, min(high, value))


def agents(dice, callers, n):
    """Each asks, reads, runs a tool and asks again; at times a person reads along."""
    lines = []
    for caller, model in callers:
        lines.append((f"{dice.uniform(0, 3):.1f}", caller, model, dice.uniform(2, 6)))
        for _ in range(n - 1):
            gap = dice.uniform(20, 60) if dice.random() < 0.05 else dice.expovariate(1 / 1.2) + 0.1
            answer = clamp(dice.lognormvariate(1.3, 0.6), 0.5, 30)
            lines.append((f"+{gap:.1f}", caller, model, answer))
    return lines


def pair():
    dice = random.Random(1)
    callers = [("planner", QWEN[0]), ("coder", LLAMA[0])]
    write("pair.trace", "Two agents, one on each of two models that do not fit together.", 8000,
          [QWEN, LLAMA], agents(dice, callers, 80))


def team():
    dice = random.Random(2)
    callers = [(f"explorer{n}", QWEN[0]) for n in range(4)] + [(f"coder{n}", LLAMA[0]) for n in range(4)]
    write("team.trace", "An orchestrator's explorers on one model, its coders on another.", 8000,
          [QWEN, LLAMA], agents(dice, callers, 40))


def morning():
    dice = random.Random(3)
    lines = []
    now = 5.0
    while now < 5400:  # the editor: bursts of completions, then thought
        for _ in range(dice.randint(5, 25)):
            lines.append((now, "editor", CODER[0], clamp(dice.lognormvariate(-0.7, 0.4), 0.2, 2)))
            now += dice.uniform(0.8, 5)
        now += dice.expovariate(1 / 60)
    now = 60.0
    while now < 5400:  # the chat
        lines.append((now, "chat", LLAMA[0], clamp(dice.lognormvariate(2.2, 0.6), 2, 60)))
        now += dice.uniform(15, 120) if dice.random() < 0.8 else dice.uniform(300, 900)
    now = 200.0
    while now < 5400:  # notes are indexed when they were saved
        for n in range(dice.randint(8, 30)):
            lines.append((now + n * 0.4, "notes", EMBED[0], 0.2))
        now += dice.uniform(120, 500)
    now = 900.0
    while now < 5400:  # a hard question for the large model, and one more about its answer
        lines.append((now, "chat", BIG[0], clamp(dice.lognormvariate(3.0, 0.4), 8, 90)))
        lines.append((now + dice.uniform(60, 90), "chat", BIG[0], dice.uniform(10, 30)))
        now += dice.uniform(700, 1300)
    lines.sort()
    write("morning.trace", "A morning: an editor, a chat, an index of notes, at times a large model.", 10000,
          [CODER, LLAMA, EMBED, BIG], [(f"{at:.1f}", *rest) for at, *rest in lines])


def bursts():
    dice = random.Random(4)
    lines = []
    for start in range(0, 1800, 150):  # three programs that send all they have at once
        for caller, model in [("eval", QWEN[0]), ("summary", LLAMA[0]), ("tests", CODER[0])]:
            if dice.random() < 0.75:
                for n in range(dice.randint(4, 24)):
                    at = start + dice.uniform(0, 12)
                    lines.append((at, caller, model, clamp(dice.lognormvariate(0.9, 0.5), 0.5, 12)))
    lines.sort()
    write("bursts.trace", "Three programs that each send many requests at once, on three models.", 8000,
          [QWEN, LLAMA, CODER], [(f"{at:.1f}", *rest) for at, *rest in lines])


pair()
team()
morning()
bursts()
