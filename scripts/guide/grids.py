"""Questions that follow from the product's tables: plan by window, every setting, command, status and exit code.

Each of them belongs to an intent of the corpus, which names it in its `grids`: a new setting or command that no answer
covers stops the corpus from loading.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from appliance import config
from appliance.errors import OperatorError
from scripts.guide import facts

_PLAN = {
    "community": [
        "community",
        "the community plan",
        "Community",
        "the community tier",
        "a community account",
        "community plan",
    ],
    "professional": [
        "professional",
        "the professional plan",
        "Professional",
        "the pro plan",
        "pro",
        "a professional account",
        "professional plan",
        "the professional tier",
    ],
    "enterprise": [
        "enterprise",
        "the enterprise plan",
        "Enterprise",
        "the enterprise tier",
        "an enterprise account",
        "enterprise plan",
    ],
}
_CALLS = "{calls|requests|API calls|queries}"
_PER = {
    "minute": (
        "{per minute|a minute|in one minute|every minute|each minute|within a minute|in 60 seconds}",
        "minute",
        "minutely",
    ),
    "hour": (
        "{per hour|an hour|in one hour|every hour|each hour|within an hour|hourly|in 60 minutes}",
        "hour",
        "hourly",
    ),
    "month": ("{per month|a month|in one month|every month|each month|within a month|monthly}", "month", "monthly"),
}
_WINDOW = [
    "How many {calls} {per} does {plan} {allow|have|include|get|give|permit}?",
    "how many {calls} {per} {on|with|for|under|in} {plan}",
    "what is the {adj} limit {of|on|for} {plan}",
    "{adj} limit {plan}",
    "{plan} {adj} {limit|quota|cap|maximum}",
    "{plan}: how many {calls} {per}?",
    "How often may {plan} call the API {per}?",
    "how often can i call {per} on {plan}",
    "{limit|quota|cap|ceiling|allowance} {per} {of|for|on} {plan}",
    "{calls} {per} {plan}",
    "{per} {plan}",
    "What's the {maximum|highest|largest} number of {calls} {per} {on|for|with} {plan}?",
    "I am on {plan}. How many {calls} {per} do I {get|have}?",
    "We use {plan}; what can we send {per}?",
    "If my account is on {plan}, how many {calls} can I make {per}?",
    "tell me the {adj} {quota|limit|allowance} {of|for} {plan}",
    "{calls} allowed {per} with {plan}",
    "on {plan}, what is the number of {calls} {per}",
    "does {plan} {have|come with} a {adj} limit, and how high is it",
    "what {adj} {volume|amount|number of calls} does {plan} come with",
    "how much can I call {per} as {plan} {customer|user|}",
    "is there a limit {per} {on|for} {plan}",
    "rate limit {per} for {plan}",
    "what does {plan} allow {per}",
    "how many times {per} may {plan} hit the endpoint",
]
_CONCURRENT = [
    "How many {calls} {at once|at the same time|in parallel|simultaneously} does {plan} {allow|have|get|permit}?",
    "how many {concurrent|parallel|simultaneous} {calls} {on|with|for|under} {plan}",
    "{concurrent|parallel|simultaneous} {calls} {plan}",
    "{plan} concurrency",
    "concurrency {limit|cap|} {of|for|on} {plan}",
    "{plan}: {concurrent|parallel} {limit|calls}",
    "How many streams can {plan} have open at {once|the same time}?",
    "what is the concurrency limit of {plan}",
    "how many calls may run in parallel on {plan}",
    "I am on {plan}. How many calls can I have open at the same time?",
    "maximum parallel {calls} with {plan}",
    "on {plan}, how many things can run at once",
    "how many at the same time with {plan}",
    "number of simultaneous {calls} {plan} {allows|permits}",
    "how many workers can hit the API at once on {plan}",
    "does {plan} allow parallel calls, and how many",
    "if I open several connections on {plan}, how many are served at once",
    "parallelism of {plan}",
    "how many concurrent {users|clients|sessions} can {plan} serve",
    "tell me how many calls {plan} may have in flight",
]


def lines() -> dict[str, list[str]]:
    """Wordings by what they ask about: `plan.community.minute`, `setting.server.port`, `command.key-create`,
    `exit.70`, `code.429`."""
    return dict([*_plans(), *_settings(), *_commands(), *_exit_codes(), *_codes()])


_ASK_CODE = [
    "What does {status|error|HTTP|http status|error code|code|} {n} mean?",
    "{what does|what is|why} {status|error|HTTP|} {n}",
    "{I get|we get|my app gets|the server returns|it answers|it says} {a|an error|status|} {n}",
    "{n}",
    "{n} {error|status|meaning|response|what now|help}",
    "{Why do I get|how do I fix|what causes|what do I do on} {a|status|error|} {n}{?|}",
    "the response {was|is|code is|has status} {n}",
    "explain {status|error|} {n}",
]
_CODES = [
    ["400", "BAD_REQUEST", "bad request"],
    ["401", "UNAUTHORIZED", "unauthorized"],
    ["403", "FORBIDDEN", "forbidden"],
    ["404", "NOT_FOUND", "not found"],
    ["405", "method not allowed"],
    ["408", "request timeout"],
    ["413", "payload too large", "content too large"],
    ["415", "unsupported media type"],
    ["431", "headers too large"],
    ["429", "RATE_LIMIT_EXCEEDED", "rate limit exceeded", "too many requests"],
    ["MONTHLY_LIMIT_EXCEEDED", "monthly limit exceeded"],
    ["500", "INTERNAL_ERROR", "internal error", "internal server error"],
    ["503", "SERVICE_UNAVAILABLE", "service unavailable"],
]


Grid = tuple[str, list[str]]


def _codes() -> Iterator[Grid]:
    for names in _CODES:
        yield f"code.{names[0]}", [question.replace("{n}", name) for name in names for question in _ASK_CODE]


def _plans() -> Iterator[Grid]:
    for plan, names in _PLAN.items():
        for window, (per, _, adjective) in _PER.items():
            yield f"plan.{plan}.{window}", [_filled(q, names, per, adjective) for q in _WINDOW]
        yield f"plan.{plan}.concurrent", [_filled(q, names, "", "") for q in _CONCURRENT]


def _filled(question: str, names: list[str], per: str, adjective: str) -> str:
    return (
        question.replace("{plan}", "{" + "|".join(names) + "}")
        .replace("{calls}", _CALLS)
        .replace("{per}", per)
        .replace("{adj}", adjective)
    )


_ASK_SETTING = [
    "What is {s}?",
    "what does {s} do",
    "what is {s} for",
    "{s}",
    "explain {s}",
    "meaning of {s}",
    "{the|} setting {s}",
    "What is the default {value |}of {s}?",
    "default {s}",
    "{s} default",
    "which default does {s} have",
    "How do I {change|set|raise|lower|configure|adjust|override} {s}?",
    "where {do I set|is|can I set} {s}",
    "{set|change} {s}",
    "what values does {s} take",
    "allowed values {of|for} {s}",
    "range of {s}",
    "{minimum|maximum} of {s}",
    "what is the unit of {s}",
    "tell me about {s}",
    "how is {s} set by default",
    "what happens if I change {s}",
    "should I touch {s}",
    "environment variable for {s}",
    "{e}",
    "what does {e} do",
    "is there a setting {s}",
    "{s} in config.toml",
    "how high is {s}",
    "what value has {s} out of the box",
    "I found {s} in the config. What is it?",
    "describe the {s} option",
    "what is {s} good for",
    "purpose of {s}",
    "{s} {meaning|explained|help|setting|option}",
]


def _settings() -> Iterator[Grid]:
    providers = {"NAME": config.ProviderSettings()}
    anybody = config.Config(Path(), plans={"NAME": config.PlanSettings()}, providers=providers)
    for setting in config.settings(anybody):
        section, key = setting.name.rsplit(".", 1)
        variable = f"APPLIANCE_{section.upper().replace('.', '__')}__{key.upper()}"
        names = "{" + "|".join([key, f"[{section}] {key}", f"`{key}`", key.replace("_", " "), f"{section}.{key}"]) + "}"
        yield f"setting.{setting.name}", [q.replace("{s}", names).replace("{e}", variable) for q in _ASK_SETTING]


_ASK_COMMAND = [
    "What does `appliance {c}` do?",
    "what does appliance {c} do",
    "appliance {c}",
    "what is the {c} command for",
    "{c} command",
    "explain appliance {c}",
    "purpose of `appliance {c}`",
    "when do I need appliance {c}",
    "what is appliance {c} good for",
    "tell me about {the|} `{c}`",
    "what happens when I run appliance {c}",
    "help {for|on|with} appliance {c}",
    "meaning of the command {c}",
    "what can I do with appliance {c}",
    "describe appliance {c}",
    "how does appliance {c} work",
    "why would I run appliance {c}",
    "does appliance {c} exist",
    "is there a command {c}",
    "what will `{c}` do",
    "usage of appliance {c}",
    "appliance {c} {usage|help|meaning|what is it}",
]


def _commands() -> Iterator[Grid]:
    for words, command in facts.commands().items():
        if not hasattr(command, "commands"):
            yield f"command.{words.replace(' ', '-')}", [q.replace("{c}", words) for q in _ASK_COMMAND]


_ASK_EXIT = [
    "What does exit code {n} mean?",
    "exit code {n}",
    "{the|} command {ended|exited|ends|exits} with {code|exit code|} {n}",
    "appliance exits with {n}",
    "exit status {n}",
    "why exit code {n}",
    "return code {n}",
    "process exited with code {n}",
    "meaning of exit code {n}",
    "rc {n}",
    "what is {exit|return|error} code {n} of the command line",
    "it ended with code {n}",
    "the appliance command returned {n}",
    "my script sees exit code {n} from appliance",
    "systemd says exit code {n}",
    "code={n}",
    "exited with status {n}",
    "appliance serve exited with {n}",
    "explain exit code {n}",
    "exit {n}",
]


def _exit_codes() -> Iterator[Grid]:
    for error in OperatorError.__subclasses__():
        yield f"exit.{error.exit_code}", [q.replace("{n}", str(error.exit_code)) for q in _ASK_EXIT]
