/* The namespaces and cgroups the keeper lives in; see namespaces.c. */
#ifndef ARCHITECT_NAMESPACES_H
#define ARCHITECT_NAMESPACES_H

#include <sys/types.h>

enum { OUTSIDE_MAX = 16 };

/* Remember the engine's namespaces and cgroups; call once, before anything is joined. */
void namespaces_remember_host(void);
/* Join the net, ipc, uts, cgroup and mount namespaces of pid. Returns 0 or -errno. */
int namespaces_join(pid_t pid);
/* Go back into the namespaces last joined. Returns 0 or -errno. */
int namespaces_return(void);
/* Go to the engine's namespaces; in the calling process only. */
void namespaces_leave(void);
/* Descriptor of the network namespace last joined, or -1. */
int namespaces_net_fd(void);
/* Go to the container's cgroup namespace alone, which what is started then is born into; CRIU, told to
 * leave cgroups alone, would not make one. In the calling process only. */
void namespaces_enter_cgroup(void);
/* Move this process into every cgroup that pid is in. */
void cgroups_enter(pid_t pid);
/* cgroup.procs of the cgroups that the keeper came from: *fds is filled, the count returned. */
int cgroups_outside(const int **fds);

#endif
