"""Questions that follow from the product's tables: plan by window, every setting, command, status and exit code."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

from appliance import config
from appliance.access.plans import PLANS
from appliance.errors import OperatorError
from scripts.guide import facts


@dataclass(slots=True)
class Intent:
    """One thing that people ask, in many wordings, with its one answer. `follow` leads to other intents' ids."""

    id: str
    answer: str
    questions: list[str]
    follow: list[tuple[str, list[str]]] = field(default_factory=list)


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
NOT_YET = " This version does not enforce plan limits yet."


def intents() -> Iterator[Intent]:
    """All of them."""
    yield from _plans()
    yield from _settings()
    yield from _commands()
    yield from _exit_codes()


def more_questions() -> dict[str, list[str]]:
    """Wordings with a status or code, for intents that the corpus answers."""
    return {
        intent: [
            question
            for name in names
            for question in (
                f"What does {{status|error|HTTP|http status|error code|code|}} {name} mean?",
                f"{{what does|what is|why}} {{status|error|HTTP|}} {name}",
                f"{{I get|we get|my app gets|the server returns|it answers|it says}} {{a|an error|status|}} {name}",
                f"{name}",
                f"{name} {{error|status|meaning|response|what now|help}}",
                f"{{Why do I get|how do I fix|what causes|what do I do on}} {{a|status|error|}} {name}{{?|}}",
                f"the response {{was|is|code is|has status}} {name}",
                f"explain {{status|error|}} {name}",
            )
        ]
        for intent, names in _CODES.items()
    }


_CODES = {
    "errors.bad_request": ["400", "BAD_REQUEST", "bad request"],
    "errors.unauthorized": ["401", "UNAUTHORIZED", "unauthorized"],
    "errors.forbidden": ["403", "FORBIDDEN", "forbidden"],
    "errors.not_found": ["404", "NOT_FOUND", "not found"],
    "errors.method": ["405", "method not allowed"],
    "errors.timeout": ["408", "request timeout"],
    "errors.too_large": ["413", "payload too large", "content too large"],
    "errors.media_type": ["415", "unsupported media type"],
    "errors.headers_large": ["431", "headers too large"],
    "errors.rate_limit": ["429", "RATE_LIMIT_EXCEEDED", "rate limit exceeded", "too many requests"],
    "errors.monthly": ["MONTHLY_LIMIT_EXCEEDED", "monthly limit exceeded"],
    "errors.internal": ["500", "INTERNAL_ERROR", "internal error", "internal server error"],
    "errors.unavailable": ["503", "SERVICE_UNAVAILABLE", "service unavailable"],
}


def _plans() -> Iterator[Intent]:
    for plan, names in _PLAN.items():
        for window in ("minute", "hour", "month"):
            per, _, adjective = _PER[window]
            value = getattr(PLANS[plan], facts.WINDOWS[window])
            many = f"{facts.number(value)} calls per {window}" if value is not None else f"unlimited calls per {window}"
            answer = f"The {plan} plan allows {many} for the whole account, all its keys together.{NOT_YET}"
            yield Intent(f"grid.{plan}.{window}", answer, [_filled(q, names, per, adjective) for q in _WINDOW])
        answer = (
            f"The {plan} plan allows {PLANS[plan].concurrent} calls at the same time for the whole account, "
            f"all its keys together.{NOT_YET}"
        )
        yield Intent(f"grid.{plan}.concurrent", answer, [_filled(q, names, "", "") for q in _CONCURRENT])


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


def _settings() -> Iterator[Intent]:
    for setting in config.settings():
        section, key = setting.name.split(".")
        variable = f"APPLIANCE_{section.upper()}__{key.upper()}"
        names = "{" + "|".join([key, f"[{section}] {key}", f"`{key}`", key.replace("_", " "), f"{section}.{key}"]) + "}"
        default = facts.placeholders()[f"setting.{setting.name}"] or "empty"
        answer = (
            f"`[{section}] {key}` is the setting for this: {setting.help}. It takes {setting.allowed}; "
            f"the default is {default}. Set it in `config.toml` or by `{variable}`."
        )
        questions = [q.replace("{s}", names).replace("{e}", variable) for q in _ASK_SETTING]
        yield Intent(f"grid.setting.{setting.name}", answer, questions)


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


def _commands() -> Iterator[Intent]:
    for words, command in facts.commands().items():
        if hasattr(command, "commands"):
            continue
        text = facts.command_help(words).rstrip(".")
        answer = f"`appliance {words}` {text[0].lower()}{text[1:]}. See its options with `appliance {words} --help`."
        yield Intent(f"grid.command.{words.replace(' ', '-')}", answer, [q.replace("{c}", words) for q in _ASK_COMMAND])


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


def _exit_codes() -> Iterator[Intent]:
    for error in OperatorError.__subclasses__():
        text = (error.__doc__ or "").split("\n")[0].rstrip(".")
        answer = (
            f"Exit code {error.exit_code} of the `appliance` command means: {text[0].lower()}{text[1:]}. "
            "The sentence on stderr says what to do."
        )
        yield Intent(
            f"grid.exit.{error.exit_code}", answer, [q.replace("{n}", str(error.exit_code)) for q in _ASK_EXIT]
        )
