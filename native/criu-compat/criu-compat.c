/* criu-compat.so: preloaded into CRIU; answers what a kernel or machine refuses, and keeps a wake off the disk.
 *
 * Why it exists: Debian stable's CRIU 4.1.1 is the version that stays on the mirrors. It gives a dump up over
 * answers that carry no information:
 *
 * 1. SO_PASSCRED and SO_PASSSEC belong to unix sockets. Since Linux 6.16 asking an internet socket for them
 *    fails with EOPNOTSUPP, where it used to answer 0. The old answer is given.
 * 2. prlimit(2) on another user's process needs CAP_SYS_RESOURCE, which some machines withhold even from
 *    root. /proc/PID/limits has the same figures (proc(5)).
 *
 * Each is an answer only after the kernel has refused; where the kernel answers, this does nothing.
 *
 * And it has things built in that a restore should not wait for:
 *
 * 3. /run/criu.kdat, what it knows of the kernel, is one file for every CRIU of the machine, and each
 *    version throws away the other's. Ours is read from architect's own file in memory.
 * 4. The folder on which it builds a container's mounts is made in /tmp: on a disk that costs a wake some
 *    milliseconds. It is made on architect's tmpfs.
 * 5. To stop a task at the end of its restore CRIU sets a hardware breakpoint. The first one on a machine
 *    makes the kernel wait for all its CPUs (synchronize_rcu() in perf_event_alloc(), kernel/events/core.c):
 *    7 to 15 ms in which nothing happens. CRIU's own way where there are no breakpoints, to stop at each
 *    system call (ptrace(2), PTRACE_SYSCALL), takes less than one; CRIU_FAULT=130 (FI_NO_BREAKPOINTS,
 *    criu/include/fault-injection.h) makes it take that way.
 *
 * Called by CRIU's own calls of these functions; loaded by src/architect/adapters/criu.py.
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <unistd.h>

#define KERNEL_CACHE "/run/criu.kdat"
#define OUR_KERNEL_CACHE "/run/architect/hot/criu.kdat"

/* Of one length, since mkdtemp(3) writes into what it is given. */
#define MOUNTS "/tmp/.criu.mntns."
#define OUR_MOUNTS "/run/architect/m."

typedef int getsockopt_function(int, int, int, void *, socklen_t *);

int getsockopt(int fd, int level, int name, void *value, socklen_t *length)
{
	static getsockopt_function *next;
	int result;

	if (!next)
		next = (getsockopt_function *)dlsym(RTLD_NEXT, "getsockopt");
	result = next(fd, level, name, value, length);
	if (result && errno == EOPNOTSUPP && level == SOL_SOCKET &&
	    (name == SO_PASSCRED || name == SO_PASSSEC) && *length >= (socklen_t)sizeof(int)) {
		*(int *)value = 0;
		*length = sizeof(int);
		result = 0;
	}
	return result;
}

static const char *const limit_names[RLIM_NLIMITS] = {
	[RLIMIT_CPU] = "Max cpu time", [RLIMIT_FSIZE] = "Max file size", [RLIMIT_DATA] = "Max data size",
	[RLIMIT_STACK] = "Max stack size", [RLIMIT_CORE] = "Max core file size",
	[RLIMIT_RSS] = "Max resident set", [RLIMIT_NPROC] = "Max processes",
	[RLIMIT_NOFILE] = "Max open files", [RLIMIT_MEMLOCK] = "Max locked memory",
	[RLIMIT_AS] = "Max address space", [RLIMIT_LOCKS] = "Max file locks",
	[RLIMIT_SIGPENDING] = "Max pending signals", [RLIMIT_MSGQUEUE] = "Max msgqueue size",
	[RLIMIT_NICE] = "Max nice priority", [RLIMIT_RTPRIO] = "Max realtime priority",
	[RLIMIT_RTTIME] = "Max realtime timeout",
};

static rlim_t limit_value(const char *word)
{
	return strcmp(word, "unlimited") ? strtoull(word, NULL, 10) : RLIM_INFINITY;
}

/* Reads one limit of a process from /proc. Returns 0, or -1 if it is not to be found. */
static int read_limit(pid_t pid, int resource, struct rlimit *limit)
{
	enum { NAME_WIDTH = 26 };
	char path[64], line[256], soft[32], hard[32];
	int result = -1;
	FILE *file;

	snprintf(path, sizeof path, "/proc/%d/limits", pid);
	file = fopen(path, "re");
	if (!file)
		return -1;
	while (result && fgets(line, sizeof line, file)) {
		size_t length = strlen(limit_names[resource]);

		if (strncmp(line, limit_names[resource], length) || line[length] != ' ' ||
		    sscanf(line + NAME_WIDTH, "%31s %31s", soft, hard) != 2)
			continue;
		limit->rlim_cur = limit_value(soft);
		limit->rlim_max = limit_value(hard);
		result = 0;
	}
	fclose(file);
	return result;
}

/* CRIU calls prlimit through syscall(2), so that is what has to be stood in front of. */
long syscall(long number, ...)
{
	long a[6], result;
	va_list values;

	va_start(values, number);
	for (int i = 0; i < 6; i++)
		a[i] = va_arg(values, long);
	va_end(values);
	register long r10 __asm__("r10") = a[3];
	register long r8 __asm__("r8") = a[4];
	register long r9 __asm__("r9") = a[5];
	__asm__ volatile("syscall"
			 : "=a"(result)
			 : "a"(number), "D"(a[0]), "S"(a[1]), "d"(a[2]), "r"(r10), "r"(r8), "r"(r9)
			 : "rcx", "r11", "memory");
	if (result >= 0 || result < -4095)
		return result;
	errno = -result;
	if (number != SYS_prlimit64 || errno != EPERM || a[2] || !a[3])
		return -1;
	if (a[1] < 0 || a[1] >= RLIM_NLIMITS || read_limit(a[0], a[1], (struct rlimit *)a[3])) {
		errno = EPERM;
		return -1;
	}
	return 0;
}

/* Before CRIU's main() reads it. */
__attribute__((constructor)) static void do_without_breakpoints(void)
{
	setenv("CRIU_FAULT", "130", 0);
}

typedef int open_function(const char *, int, ...);

/* CRIU is built for large files, so this is its open(2). */
int open64(const char *path, int flags, ...)
{
	static open_function *next;
	va_list values;
	int mode, fd;

	va_start(values, flags);
	mode = va_arg(values, int);
	va_end(values);
	if (!next)
		next = (open_function *)dlsym(RTLD_NEXT, "open64");
	if ((flags & O_ACCMODE) == O_RDONLY && !strcmp(path, KERNEL_CACHE)) {
		fd = next(OUR_KERNEL_CACHE, flags, mode);
		if (fd >= 0)
			return fd;
	}
	return next(path, flags, mode);
}

typedef char *mkdtemp_function(char *);

char *mkdtemp(char *template)
{
	_Static_assert(sizeof MOUNTS == sizeof OUR_MOUNTS, "one has to fit in the place of the other");
	static mkdtemp_function *next;

	if (!next)
		next = (mkdtemp_function *)dlsym(RTLD_NEXT, "mkdtemp");
	if (!strncmp(template, MOUNTS, sizeof MOUNTS - 1))
		memcpy(template, OUR_MOUNTS, sizeof OUR_MOUNTS - 1);
	return next(template);
}
