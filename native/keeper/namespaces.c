/* Where the keeper lives: in the container's namespaces and cgroup, so that an engine that knows only
 * the keeper's pid finds the container there (podman cp, top, stats, --network container:X), also while
 * nothing else of the container exists. Jobs that need the host (CRIU) go back first.
 */
#define _GNU_SOURCE
#include "namespaces.h"

#include <errno.h>
#include <fcntl.h>
#include <sched.h>
#include <stdio.h>
#include <string.h>
#include <unistd.h>

enum { NET, IPC, UTS, CGROUP, MNT, KINDS };

static const struct {
	const char *name;
	int flag;
} kinds[KINDS] = {
	[NET] = { "net", CLONE_NEWNET },
	[IPC] = { "ipc", CLONE_NEWIPC },
	[UTS] = { "uts", CLONE_NEWUTS },
	[CGROUP] = { "cgroup", CLONE_NEWCGROUP },
	/* Last: once in another mount namespace, /proc/PID may not be there any more. */
	[MNT] = { "mnt", CLONE_NEWNS },
};

static int host[KINDS] = { -1, -1, -1, -1, -1 };
static int outside[OUTSIDE_MAX];
static int outside_count;
static int container[KINDS] = { -1, -1, -1, -1, -1 }; /* kept open: between two inits nothing else holds them */
static int joined;

/* Calls visit with the path of cgroup.procs for each hierarchy in /proc/PID/cgroup (cgroups(7)). */
static void each_cgroup(pid_t pid, void (*visit)(const char *procs))
{
	char path[64], line[4096], procs[4224];
	FILE *file;

	snprintf(path, sizeof path, "/proc/%d/cgroup", pid);
	file = fopen(path, "re");
	if (!file)
		return;
	while (fgets(line, sizeof line, file)) {
		char *controllers = strchr(line, ':'), *directory;
		const char *mount;

		if (!controllers || !(directory = strchr(++controllers, ':')))
			continue;
		*directory++ = 0;
		directory[strcspn(directory, "\n")] = 0;
		mount = controllers;
		if (!strncmp(controllers, "name=", 5))
			mount = controllers + 5;
		if (*mount) {
			snprintf(procs, sizeof procs, "/sys/fs/cgroup/%s%s/cgroup.procs", mount, directory);
			visit(procs);
			continue;
		}
		/* The unified hierarchy: alone at the root, or beside v1 in a hybrid layout. */
		snprintf(procs, sizeof procs, "/sys/fs/cgroup/unified%s/cgroup.procs", directory);
		if (access(procs, F_OK))
			snprintf(procs, sizeof procs, "/sys/fs/cgroup%s/cgroup.procs", directory);
		visit(procs);
	}
	fclose(file);
}

static void remember_outside(const char *procs)
{
	int fd = outside_count < OUTSIDE_MAX ? open(procs, O_WRONLY | O_CLOEXEC) : -1;

	if (fd >= 0)
		outside[outside_count++] = fd;
}

static void enter(const char *procs)
{
	int fd = open(procs, O_WRONLY | O_CLOEXEC);

	if (fd < 0)
		return;
	/* A hierarchy that refuses (no such controller here) is one the container is not held by. */
	if (write(fd, "0", 1) != 1)
		errno = 0;
	close(fd);
}

void namespaces_remember_host(void)
{
	char path[32];

	for (int i = 0; i < KINDS; i++) {
		snprintf(path, sizeof path, "/proc/self/ns/%s", kinds[i].name);
		host[i] = open(path, O_RDONLY | O_CLOEXEC);
	}
	each_cgroup(getpid(), remember_outside);
}

int cgroups_outside(const int **fds)
{
	*fds = outside;
	return outside_count;
}

void cgroups_enter(pid_t pid)
{
	each_cgroup(pid, enter);
}

void namespaces_leave(void)
{
	if (joined)
		for (int i = KINDS - 1; i >= 0; i--)
			setns(host[i], kinds[i].flag);
	joined = 0;
}

int namespaces_return(void)
{
	int result = 0;

	for (int i = 0; i < KINDS; i++)
		if (container[i] >= 0 && setns(container[i], kinds[i].flag))
			result = -errno;
	joined = 1;
	return result;
}

int namespaces_join(pid_t pid)
{
	char path[64];

	namespaces_leave();
	for (int i = 0; i < KINDS; i++) {
		int fd;

		snprintf(path, sizeof path, "/proc/%d/ns/%s", pid, kinds[i].name);
		fd = open(path, O_RDONLY | O_CLOEXEC);
		if (fd < 0)
			return -errno;
		if (container[i] >= 0)
			close(container[i]);
		container[i] = fd;
	}
	return namespaces_return();
}

int namespaces_net_fd(void)
{
	return container[NET];
}

void namespaces_enter_cgroup(void)
{
	if (container[CGROUP] >= 0)
		setns(container[CGROUP], kinds[CGROUP].flag);
}
