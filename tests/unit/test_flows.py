"""A connection's text: what is written is read, and what is no connection is refused with the reason."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from architect.contract.flows import BadFlow, Flow

ports = st.integers(1, 65535)


addresses = st.one_of(
    st.tuples(st.ip_addresses(v=4), st.ip_addresses(v=4)),
    st.tuples(st.ip_addresses(v=6), st.ip_addresses(v=6)),
)


@given(st.sampled_from(["tcp", "udp"]), addresses, ports, ports)
def test_what_is_written_is_read(
    protocol: str, both: tuple[Any, Any], port: int, peer_port: int
) -> None:
    flow = Flow(protocol, str(both[0]), port, str(both[1]), peer_port)
    assert Flow.parse(str(flow)) == flow
    assert flow.is_v6 == (both[0].version == 6)


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("tcp|10.0.0.1|80|10.0.0.2", "not enough values"),
        ("sctp|10.0.0.1|80|10.0.0.2|81", "neither tcp nor udp"),
        ("tcp|10.0.0.1|80|fd00::1|81", "different families"),
        ("tcp|10.0.0.1|0|10.0.0.2|81", "between 1 and 65535"),
        ("tcp|10.0.0.1|80|10.0.0.2|65536", "between 1 and 65535"),
        ("tcp|10.0.0|80|10.0.0.2|81", "does not appear to be"),
    ],
)
def test_what_is_no_flow_is_refused(text: str, why: str) -> None:
    with pytest.raises(BadFlow, match=why) as caught:
        Flow.parse(text)
    assert text in str(caught.value)
