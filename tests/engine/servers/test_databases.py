"""psql and the client of mariadb, with servers that hibernate between and within their questions."""

import pytest

from tests.engine.servers.capture import Capture
from tests.engine.servers.machine import Machine, Session
from tests.engine.servers.serving import serve
from tests.engine.support import Client, Container, Lab

pytestmark = pytest.mark.engine


# ---- postgres -------------------------------------------------------------------------------------


def psql(server: Container) -> list[str]:
    return ["psql", "-h", server.address, "-U", "postgres", "-XqAt"]


@pytest.fixture(scope="module")
def postgres(shared_lab: Lab, client: Machine) -> Container:
    return serve(
        shared_lab,
        "postgres",
        *("/usr/lib/postgresql/15/bin/postgres", "-D", "/srv/postgres", "-c", "listen_addresses=*"),
        options=["--user", "postgres"],
        port=5432,
        ready=lambda server: client.run(*psql(server), "-c", "select 1").code == 0,
    )


def psql_session(client: Machine, server: Container) -> Session:
    # Line by line, although its output is no terminal.
    return client.session("stdbuf", "-oL", *psql(server))


def test_psql_asks_a_sleeper(postgres: Container, client: Machine, wire: Capture) -> None:
    for number in range(3):
        postgres.sleep()
        assert client.must(*psql(postgres), "-c", f"select 6 * {number}") == str(6 * number)
    assert len(wire.exchanges("tcp", 5432)) == 3


def test_psql_transaction_goes_on(postgres: Container, client: Machine, wire: Capture) -> None:
    with psql_session(client, postgres) as one:
        one.send("create table kept (number int);")
        one.send("begin;")
        for number in range(1, 4):
            one.send(f"insert into kept values ({number});")
            assert one.ask("select sum(number) from kept;") == str(number * (number + 1) // 2)
            postgres.sleep()
        # Another one sees nothing of it, and wakes the server while the first is silent.
        count = "select count(*) from kept"
        assert client.must(*psql(postgres), "-c", count) == "0"
        postgres.sleep()
        one.send("commit;")
        assert one.ask("select pg_backend_pid() > 0;") == "t"
        postgres.sleep()
        assert client.must(*psql(postgres), "-c", count) == "3"
        one.send("drop table kept;")
        assert one.ask("select 'still the same session';") == "still the same session"


def test_psql_lock_is_kept(postgres: Container, client: Machine, wire: Capture) -> None:
    """Who waits only, waits on, and gets what it waits for."""
    with psql_session(client, postgres) as holder, psql_session(client, postgres) as waiter:
        assert holder.ask("select pg_advisory_lock(7) is not null;") == "t"
        waiter.send("select 'asked', pg_advisory_lock(7);")
        postgres.sleep()
        assert holder.ask("select pg_advisory_unlock(7);") == "t"
        assert waiter.line() == "asked|"


def test_psql_is_notified(postgres: Container, client: Machine, wire: Capture) -> None:
    with psql_session(client, postgres) as listener:
        listener.send("listen news;")
        assert listener.ask("select 'listens';") == "listens"
        postgres.sleep()
        client.must(*psql(postgres), "-c", "notify news, 'of the sleeper'")
        postgres.sleep()
        listener.send("select 'asks';")
        assert "of the sleeper" in listener.until("Asynchronous notification")


# ---- mariadb --------------------------------------------------------------------------------------

USER = "create or replace user tester;\ngrant all on *.* to tester;\n"


def mariadb(server: Container) -> list[str]:
    words = ["mariadb", "-h", server.address, "-u", "tester", "--batch", "--skip-column-names"]
    return [*words, "--unbuffered"]


@pytest.fixture(scope="module")
def maria(shared_lab: Lab, client: Machine) -> Container:
    return serve(
        shared_lab,
        "mariadb",
        *("mariadbd", "--user=mysql", "--datadir=/srv/mysql", "--socket=/tmp/socket"),
        *("--bind-address=0.0.0.0", "--skip-name-resolve", "--init-file=/tmp/conf"),
        "--innodb-log-file-size=4M",
        configuration=USER,
        port=3306,
        ready=lambda server: client.run(*mariadb(server), "-e", "select 1").code == 0,
    )


def test_mariadb_greets_although_asleep(maria: Container, client: Machine, wire: Capture) -> None:
    """The server speaks first: a handshake packet of protocol 10 (its length: three bytes)."""
    maria.sleep()
    with client.inside():
        raw = Client.connect(maria.address, 3306)
    header = raw.bytes(4)
    greeting = raw.bytes(int.from_bytes(header[:3], "little"))
    assert greeting[0] == 10
    assert b"MariaDB" in greeting
    assert b"mysql_native_password" in greeting


def test_mariadb_asks_a_sleeper(maria: Container, client: Machine, wire: Capture) -> None:
    for number in range(3):
        maria.sleep()
        assert client.must(*mariadb(maria), "-e", f"select 6 * {number}") == str(6 * number)
    assert len(wire.exchanges("tcp", 3306)) == 3


def test_mariadb_session_goes_on(maria: Container, client: Machine, wire: Capture) -> None:
    with client.session(*mariadb(maria)) as one:
        identity = one.ask("select connection_id();")
        one.send("create database test; use test; create table kept (number int);")
        one.send("set @mine = 41; create temporary table own (number int); start transaction;")
        for number in range(1, 4):
            one.send(f"insert into kept values ({number}); insert into own values ({number});")
            assert one.ask("select count(*) from kept;") == str(number)
            maria.sleep()
        assert one.ask("select @mine + 1, count(*) from own;") == "42\t3"
        assert client.must(*mariadb(maria), "-e", "select count(*) from test.kept") == "0"
        maria.sleep()
        one.send("commit;")
        assert one.ask("select connection_id();") == identity
        maria.sleep()
        assert client.must(*mariadb(maria), "-e", "select count(*) from test.kept") == "3"
        one.send("drop database test;")
        assert one.ask("select 'still here';") == "still here"
