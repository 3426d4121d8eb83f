"""Go's durations: what time.ParseDuration takes, with its results, and nothing else."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from architect.contract import durations
from architect.contract.errors import InvalidDuration

LIMIT = 2**63

# From the table of the Go standard library's own test (time/time_test.go, parseDurationTests).
ACCEPTED = {
    "0": 0,
    "5s": 5 * durations.SECOND,
    "30s": 30 * durations.SECOND,
    "1478s": 1478 * durations.SECOND,
    "-5s": -5 * durations.SECOND,
    "+5s": 5 * durations.SECOND,
    "-0": 0,
    "+0": 0,
    "5.0s": 5 * durations.SECOND,
    "5.6s": 5600 * durations.MILLISECOND,
    "5.s": 5 * durations.SECOND,
    ".5s": 500 * durations.MILLISECOND,
    "1.0s": durations.SECOND,
    "1.00s": durations.SECOND,
    "1.004s": 1004 * durations.MILLISECOND,
    "1.0040s": 1004 * durations.MILLISECOND,
    "100.00100s": 100 * durations.SECOND + durations.MILLISECOND,
    "10ns": 10,
    "11us": 11 * durations.MICROSECOND,
    "12µs": 12 * durations.MICROSECOND,
    "12μs": 12 * durations.MICROSECOND,
    "13ms": 13 * durations.MILLISECOND,
    "14s": 14 * durations.SECOND,
    "15m": 15 * durations.MINUTE,
    "16h": 16 * durations.HOUR,
    "3h30m": 3 * durations.HOUR + 30 * durations.MINUTE,
    "10.5s4m": 4 * durations.MINUTE + 10500 * durations.MILLISECOND,
    "-2m3.4s": -(2 * durations.MINUTE + 3400 * durations.MILLISECOND),
    "1h2m3s4ms5us6ns": 3723 * durations.SECOND + 4005006,
    "39h9m14.425s": 140954 * durations.SECOND + 425 * durations.MILLISECOND,
    "52763797000ns": 52763797000,
    "0.3333333333333333333h": 20 * durations.MINUTE,
    "9007199254740993ns": 9007199254740993,
    "9223372036854775807ns": LIMIT - 1,
    "9223372036854775.807us": LIMIT - 1,
    "9223372036s854ms775us807ns": LIMIT - 1,
    "-9223372036854775808ns": -LIMIT,
    "-9223372036854775.808us": -LIMIT,
    "-2562047h47m16.854775808s": -LIMIT,
    "0.100000000000000000000h": 6 * durations.MINUTE,
    "0.830103483285477580700h": 49 * durations.MINUTE + 48372539827,
}

REFUSED = [
    "",
    "3",
    "-",
    "s",
    ".",
    "-.",
    ".s",
    "+.s",
    "\x85\x85",
    "\xffff",
    "hello \xffff world",
    "1 s",
    " 1s",
    "1s ",
    "1d",
    "1S",
    "--1s",
    "1e3s",
    "0x1s",
    "١s",  # a digit, but not one of Go's
    "9223372036854775810ns",
    "9223372036854775808ns",
    "-9223372036854775809ns",
    "9223372036854776us",
    "3000000h",
    "9223372036854775.808us",
    "9223372036854ms775us808ns",
]


@pytest.mark.parametrize(("text", "nanoseconds"), ACCEPTED.items())
def test_parses_as_go_does(text: str, nanoseconds: int) -> None:
    assert durations.parse(text) == nanoseconds


@pytest.mark.parametrize("text", REFUSED)
def test_refuses_what_go_refuses(text: str) -> None:
    with pytest.raises(InvalidDuration) as caught:
        durations.parse(text)
    assert len(str(caught.value).splitlines()) == 1


@pytest.mark.parametrize(
    ("nanoseconds", "text"),
    [
        (0, "0s"),
        (1, "1ns"),
        (1100, "1.1µs"),
        (2200 * durations.MICROSECOND, "2.2ms"),
        (3300 * durations.MILLISECOND, "3.3s"),
        (4 * durations.MINUTE + 5 * durations.SECOND, "4m5s"),
        (5 * durations.HOUR + 6 * durations.MINUTE + 7001 * durations.MILLISECOND, "5h6m7.001s"),
        (8 * durations.MINUTE + 1, "8m0.000000001s"),
        (-durations.MINUTE, "-1m0s"),
        (LIMIT - 1, "2562047h47m16.854775807s"),
        (-LIMIT, "-2562047h47m16.854775808s"),
    ],
)
def test_renders_as_go_does(nanoseconds: int, text: str) -> None:
    assert durations.render(nanoseconds) == text


@given(st.integers(-LIMIT, LIMIT - 1))
def test_what_is_rendered_parses_to_the_same_within_float_rounding(nanoseconds: int) -> None:
    # Go computes fractions in float64, which holds less than one nanosecond in a fraction of a
    # second, so the way back may be one short.
    assert abs(durations.parse(durations.render(nanoseconds)) - nanoseconds) <= 1


@given(
    st.integers(0, 10**6),
    st.integers(0, 59),
    st.integers(0, 59),
    st.integers(0, 999),
    st.booleans(),
)
def test_whole_numbers_add_up(hours: int, minutes: int, seconds: int, ms: int, minus: bool) -> None:
    text = f"{hours}h{minutes}m{seconds}s{ms}ms"
    total = ((hours * 60 + minutes) * 60 + seconds) * durations.SECOND + ms * durations.MILLISECOND
    assert durations.parse(f"-{text}" if minus else text) == (-total if minus else total)


@given(st.one_of(st.text(), st.text(alphabet="0123456789.-+hmsnuµ ")))
def test_any_text_is_parsed_or_refused(text: str) -> None:
    nanoseconds, refused = 0, "-"
    try:
        nanoseconds = durations.parse(text)
    except InvalidDuration as error:
        refused = str(error)
    assert -LIMIT <= nanoseconds < LIMIT
    assert len(refused.splitlines()) == 1


def test_a_number_of_a_million_digits_is_refused_at_once() -> None:
    with pytest.raises(InvalidDuration):
        durations.parse("9" * 10**6 + "h")
    with pytest.raises(InvalidDuration):
        durations.parse("9" * 10**6)
    assert durations.parse("0" * 10**6 + "1s") == durations.SECOND
