"""How people really write: greetings around the question, other words for the same, small letters, typing errors."""

from __future__ import annotations

import random
import re

BEFORE = (
    "Hi, ",
    "Hi! ",
    "Hello, ",
    "hello ",
    "hey ",
    "Hey, ",
    "Good morning. ",
    "Good afternoon, ",
    "Quick question: ",
    "Question: ",
    "Sorry, ",
    "Excuse me, ",
    "Please tell me: ",
    "Could you tell me: ",
    "One more thing: ",
    "ok, ",
    "OK. ",
    "So, ",
    "um, ",
    "Well, ",
    "Help! ",
    "I have a question. ",
    "I am new here. ",
    "We are a small team. ",
    "Dear guide, ",
    "I was wondering: ",
    "just curious, ",
    "Another question: ",
    "Okay, next: ",
    "And now: ",
    "Thanks. ",
    "Right. ",
    "I need help. ",
    "My boss asks: ",
    "A colleague wants to know: ",
    "For our documentation: ",
    "I'm confused. ",
)
AFTER = (
    " please",
    " Please.",
    " Thanks!",
    " thanks",
    " thx",
    " Thank you.",
    " I could not find it.",
    " It is urgent.",
    " Please be brief.",
    " I am stuck.",
    "??",
    "!",
    " ...",
    " pls",
    " asap",
    " Any idea?",
    " Can you help?",
    " cheers",
    " That would help me.",
    " I don't get it.",
    " Explain it simply.",
)

# Words that may stand for each other in most questions; the first of a line for any of its line.
_ALIKE = (
    "make create generate add",
    "create make generate",
    "delete remove erase",
    "remove delete",
    "show display list print",
    "big large",
    "large big",
    "use run",
    "start launch run boot",
    "stop halt end quit",
    "server box machine appliance",
    "appliance server box system",
    "machine server computer box",
    "key api-key apikey",
    "keys api-keys credentials",
    "limit cap ceiling quota",
    "limits caps quotas",
    "request call query",
    "requests calls queries",
    "call request",
    "calls requests",
    "where whereabouts",
    "get obtain receive",
    "need require want",
    "want wish need",
    "change modify alter edit",
    "set configure put",
    "find locate see",
    "see view look-at",
    "tell explain",
    "explain describe",
    "allowed permitted",
    "allow permit let",
    "possible feasible",
    "happens occurs",
    "error failure problem",
    "wrong bad off",
    "fast quick",
    "model llm",
    "file document",
    "folder directory",
    "directory folder dir",
    "default standard preset",
    "maximum max highest",
    "max maximum",
    "minimum min lowest",
    "answer reply response",
    "answers replies responses",
    "reply answer",
    "text output",
    "install set-up deploy",
    "stored kept saved",
    "saved stored kept",
    "store save keep",
    "keep retain store",
    "encrypted secured protected",
    "secure safe",
    "safe secure",
    "works functions",
    "work function",
    "command cmd",
    "setting option parameter",
    "settings options configuration",
    "config configuration settings",
    "users people persons",
    "user person",
    "app application program",
    "internet web net online",
    "offline disconnected",
    "send transmit post",
    "look check",
    "check verify inspect",
    "backup back-up",
    "password passphrase",
    "restart reboot",
    "log logs",
    "logs log logfiles",
    "graphics video",
    "memory ram",
    "ram memory",
    "disk drive storage",
)
ALIKE = {line.split()[0]: [word.replace("-", " ") for word in line.split()[1:]] for line in _ALIKE}
SMALL = {
    "a",
    "an",
    "the",
    "do",
    "does",
    "is",
    "are",
    "of",
    "to",
    "for",
    "my",
    "i",
    "it",
    "please",
    "can",
    "in",
    "on",
    "me",
}
NEIGHBOURS = {
    key: near
    for row in ("qwertyuiop", "asdfghjkl", "zxcvbnm")
    for key, near in ((k, row[max(0, i - 1) : i] + row[i + 1 : i + 2]) for i, k in enumerate(row))
}

_PLAIN = re.compile(r"[A-Za-z']+")


def said(draw: random.Random, question: str) -> str:
    """`question` as somebody might type it."""
    return cased(draw, mistyped(draw, framed(draw, reworded(draw, question))))


def reworded(draw: random.Random, text: str) -> str:
    """Now and then another word for the same, or a word left out."""
    if draw.random() < 0.35:
        words = text.split(" ")
        for i, word in enumerate(words):
            core = word.strip("?.,!:;").lower()
            if core in ALIKE and draw.random() < 0.35:
                words[i] = word.lower().replace(core, draw.choice(ALIKE[core]))
        text = " ".join(words)
    if draw.random() < 0.1 and len(words := text.split(" ")) > 5:
        del words[draw.randrange(len(words))]
        text = " ".join(words)
    if draw.random() < 0.15:
        kept = [w for w in text.split(" ") if w.lower() not in SMALL or draw.random() < 0.5]
        text = " ".join(kept) if len(kept) > 1 else text
    return text


def framed(draw: random.Random, text: str) -> str:
    """A greeting or a reason before, a please or thanks after."""
    if draw.random() < 0.18:
        before = draw.choice(BEFORE)
        text = before + (text[:1].lower() + text[1:] if before.endswith((", ", ": ")) and draw.random() < 0.7 else text)
    if draw.random() < 0.12:
        text += draw.choice(AFTER)
    return text


def mistyped(draw: random.Random, text: str, share: float = 0.25) -> str:
    """With probability `share`, one to three typing errors in words of four letters or more."""
    if draw.random() >= share:
        return text
    for _ in range(draw.choice((1, 1, 1, 2, 2, 3))):
        places = [m for m in _PLAIN.finditer(text) if len(m[0]) >= 4]
        if not places:
            break
        word = draw.choice(places)
        at = word.start() + draw.randrange(1, len(word[0]))
        letter = text[at]
        kind = draw.random()
        if kind < 0.3:
            text = text[:at] + text[at + 1 :]
        elif kind < 0.5:
            text = text[: at - 1] + letter + text[at - 1] + text[at + 1 :]
        elif kind < 0.7:
            text = text[:at] + letter + text[at:]
        else:
            text = text[:at] + draw.choice(NEIGHBOURS.get(letter.lower()) or letter) + text[at + 1 :]
    return text


def cased(draw: random.Random, text: str) -> str:
    """All small, all capitals, or with the punctuation at the end left out."""
    kind = draw.random()
    if kind < 0.35:
        text = text.lower()
    elif kind < 0.38:
        text = text.upper()
    elif kind < 0.50:
        text = text[:1].upper() + text[1:]
    if draw.random() < 0.35:
        text = text.rstrip("?.! ") or text
    elif draw.random() < 0.15 and text[-1:].isalpha():
        text += "?"
    return text
