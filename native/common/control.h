/* What runc-architect, the keeper and the daemon agree on: paths, and the keeper's control protocol.
 *
 * Each managed container has a directory RUN_DIR/containers/ID with
 *   ctl           the keeper's SOCK_SEQPACKET socket; one text message a request, one a reply
 *   init.pid      runc's pid file of the container's first init
 *   checkpoint    symbolic link to the images of a whole, committed checkpoint; its presence is the
 *                 commit: an init that dies during a dump is hibernated if the link exists, else dead
 *   restore.argv  the restore command, arguments separated by NUL, written before each dump
 *   restored.pid  CRIU's pid file of a restore
 *   movable       there if the container is a pod's: its start and its stop are the daemon's to decide, as
 *                 long as CLUSTER_MARK says that the machine is a cluster's node
 *   stop          the number of a stop signal that came while no daemon was there to decide
 *
 * Requests: status | watch | dump-begin CONTAINER | dump-end | wake | arm | kill N | exit N
 * Replies : "ok KEY=VALUE ..." or "error TEXT". After `watch` the keeper sends the status line again at
 * each change of phase, and the end of the connection is the end of the keeper.
 */
#ifndef ARCHITECT_CONTROL_H
#define ARCHITECT_CONTROL_H

#define RUN_DIR "/run/architect"
#define DAEMON_SOCKET RUN_DIR "/architectd.sock"
#define CONTAINERS_DIR RUN_DIR "/containers"
#define CLUSTER_MARK "/var/lib/architect/cluster"
#define PREFIX_DIR "/usr/local/lib/architect"
#define LIBEXEC_DIR PREFIX_DIR "/libexec"

enum { MESSAGE_MAX = 4096 };

/* The descriptor under which CRIU finds the container's network namespace (--inherit-fd). */
enum { RESTORE_NETNS_FD = 200 };

#endif
