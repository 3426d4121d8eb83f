"""Has files of every kind and a connection to answer on: `kept.py ADDRESS PORT FOLDER`, in a pod that moves.

FOLDER is an emptyDir. Each line that it reads on a connection is answered by a line of JSON: the connection's
number of lines so far, its own address, and whether each kind of file is as it was made.
"""

import json
import os
import shutil
import socketserver
import stat
import sys
from pathlib import Path

ADDRESS, PORT, FOLDER = sys.argv[1], int(sys.argv[2]), Path(sys.argv[3])
WORK = Path("/kept")
HOLE = 64 << 20
REMOVED = Path("/etc/group")
EMPTIED = Path("/etc/default")

WORK.mkdir()
REMOVED.unlink()
shutil.rmtree(EMPTIED)
EMPTIED.mkdir()
(EMPTIED / "mine").write_text("mine")
(WORK / "owned").write_text("owned")
os.chown(WORK / "owned", 1234, 4321)
(WORK / "owned").chmod(0o4750)
os.setxattr(WORK / "owned", "user.kept", b"yes")
os.link(WORK / "owned", WORK / "linked")
(WORK / "symbolic").symlink_to("nowhere")
os.mkfifo(WORK / "pipe")
with (WORK / "sparse").open("wb") as sparse:
    sparse.seek(HOLE)
    sparse.write(b"end")
unlinked = (WORK / "unlinked").open("w+")
unlinked.write("still here")
unlinked.flush()
(WORK / "unlinked").unlink()
log = (FOLDER / "log").open("a+")
log.write("begun\n")
log.flush()


def files() -> dict[str, bool]:
    """Whether each is as it was made."""
    owned, sparse = (WORK / "owned").stat(), (WORK / "sparse").stat()
    unlinked.seek(0)
    log.write("asked\n")
    log.flush()
    return {
        "deleted file of the image": not REMOVED.exists(),
        "replaced directory of the image": [one.name for one in EMPTIED.iterdir()] == ["mine"],
        "owner and mode": (owned.st_uid, owned.st_gid, owned.st_mode & 0o7777)
        == (1234, 4321, 0o4750),
        "extended attribute": os.getxattr(WORK / "owned", "user.kept") == b"yes",
        "hard link": owned.st_ino == (WORK / "linked").stat().st_ino and owned.st_nlink == 2,
        "symbolic link": os.readlink(WORK / "symbolic") == "nowhere",
        "named pipe": stat.S_ISFIFO((WORK / "pipe").stat().st_mode),
        "sparse file": sparse.st_size == HOLE + 3 and sparse.st_blocks * 512 < HOLE // 2,
        "open file without a name": unlinked.read() == "still here",
        "open file in an emptyDir": (FOLDER / "log").read_text().startswith("begun\nasked\n")
        and os.fstat(log.fileno()).st_ino == (FOLDER / "log").stat().st_ino,
    }


class Handler(socketserver.StreamRequestHandler):
    """One connection."""

    def handle(self) -> None:
        for number, _ in enumerate(self.rfile):
            own = self.request.getsockname()[0]
            found = {"number": number, "address": own, "files": files()}
            self.wfile.write(json.dumps(found).encode() + b"\n")


socketserver.ThreadingTCPServer.allow_reuse_address = True
with socketserver.ThreadingTCPServer((ADDRESS, PORT), Handler) as server:
    print("serving", flush=True)
    server.serve_forever()
