"""SMTP and FTP: the server speaks first, and a dialogue of many lines outlives hibernations."""

import ftplib
import io
import smtplib

import pytest

from tests.engine.servers.capture import Capture
from tests.engine.servers.machine import DEADLINE_S, Machine
from tests.engine.servers.serving import serve
from tests.engine.support import Client, Container, Lab, wait_until

pytestmark = pytest.mark.engine


def greeted(client: Machine, server: Container, port: int) -> str:
    """Return the first line that a server sends; empty while nobody listens."""
    try:
        with client.inside():
            raw = Client.connect(server.address, port)
        line = raw.line()
    except OSError:
        return ""
    raw.close()
    return line


# ---- SMTP -----------------------------------------------------------------------------------------

POSTFIX = """
compatibility_level = 3.6
maillog_file = /dev/stdout
myhostname = mail.architect.test
mydestination = architect.test
local_recipient_maps =
local_transport = discard:
alias_maps =
inet_interfaces = all
inet_protocols = ipv4
smtpd_peername_lookup = no
smtpd_relay_restrictions = reject_unauth_destination
"""


@pytest.fixture(scope="module")
def postfix(shared_lab: Lab, client: Machine) -> Container:
    return serve(
        shared_lab,
        "postfix",
        *("sh", "-c", "cp /tmp/conf /etc/postfix/main.cf && exec postfix start-fg"),
        configuration=POSTFIX,
        port=25,
        ready=lambda server: greeted(client, server, 25),
    )


def test_smtp_greets_although_asleep(postfix: Container, client: Machine, wire: Capture) -> None:
    for _ in range(2):
        postfix.sleep()
        assert greeted(client, postfix, 25) == "220 mail.architect.test ESMTP Postfix"


def test_smtp_dialogue_goes_on(postfix: Container, client: Machine, wire: Capture) -> None:
    with client.inside():
        dialogue = smtplib.SMTP(postfix.address, 25, "client.architect.test", DEADLINE_S)
    with dialogue:
        assert dialogue.ehlo()[0] == 250
        postfix.sleep()
        assert dialogue.mail("one@client.architect.test")[0] == 250
        postfix.sleep()
        assert dialogue.rcpt("nobody@elsewhere.test")[0] == 554
        assert dialogue.rcpt("two@architect.test")[0] == 250
        assert dialogue.docmd("DATA")[0] == 354
        dialogue.send("Subject: half a message\r\n\r\nIt was asleep ")
        postfix.sleep()
        dialogue.send("in the middle.\r\n.\r\n")
        code, text = dialogue.getreply()
        assert code == 250
        number = text.split()[-1].decode()
        postfix.sleep()
        assert dialogue.noop()[0] == 250
    wait_until(
        lambda: any(number in line and "status=sent" in line for line in postfix.logs()),
        f"message {number} to be delivered",
    )


# ---- FTP ------------------------------------------------------------------------------------------

VSFTPD = [
    *("anonymous_enable=YES", "background=NO", "connect_from_port_20=YES", "listen=YES"),
    *("listen_ipv6=NO", "secure_chroot_dir=/run/vsftpd/empty"),
]


@pytest.fixture(scope="module")
def vsftpd(shared_lab: Lab, client: Machine) -> Container:
    return serve(
        shared_lab,
        "vsftpd",
        # Under a shell: as the first process it ends when it is given a child that is not its own.
        *("sh", "-c", "vsftpd /tmp/conf; exit"),
        configuration="\n".join([*VSFTPD, ""]),
        port=21,
        ready=lambda server: greeted(client, server, 21),
    )


def test_ftp_greets_although_asleep(vsftpd: Container, client: Machine, wire: Capture) -> None:
    for _ in range(2):
        vsftpd.sleep()
        assert greeted(client, vsftpd, 21) == "220 (vsFTPd 3.0.3)"


@pytest.mark.parametrize("passive", [True, False], ids=["passive", "active"])
def test_ftp_control_goes_on(
    vsftpd: Container, client: Machine, wire: Capture, passive: bool
) -> None:
    """A file is fetched over a control connection whose server was asleep in between."""
    vsftpd.sleep()
    with client.inside():
        control = ftplib.FTP(timeout=DEADLINE_S)
        control.connect(vsftpd.address)
    with control:
        control.set_pasv(passive)
        # Awake until then: who has not logged in has a process that may open no file (RLIMIT_NOFILE
        # is 0), and CRIU needs one in it.
        assert control.login().startswith("230")
        vsftpd.sleep()
        assert control.pwd() == "/"
        for _ in range(2):
            vsftpd.sleep()
            received = io.BytesIO()
            with client.inside():
                control.retrbinary("RETR file", received.write)
            assert received.getvalue() == b"a file\n"
        vsftpd.sleep()
        assert control.quit().startswith("221")
