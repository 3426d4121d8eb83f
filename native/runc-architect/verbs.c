/* What each OCI verb means for a managed container, awake or hibernated. Called by main.c.
 *
 * With the daemon away: create asks architect-admit instead (the same decision, a process of its own);
 * state, kill and delete need only the keeper; exec and pause need the daemon only if the container is
 * hibernated, and then fail with a message that says so.
 */
#define _GNU_SOURCE
#include "verbs.h"

#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#include "../common/control.h"
#include "peers.h"

#define MANAGED_ANNOTATION "architect.loopholelabs.io/managed-containers"
#define KEEPER LIBEXEC_DIR "/keeper"
#define ADMIT PREFIX_DIR "/venv/bin/architect-admit"
/* A link to the runc of a distribution that keeps it elsewhere; architect-node makes it. */
#define NODE_RUNC LIBEXEC_DIR "/runc"

/* How long a start waits for a daemon that is away: less than the kubelet does (2 min) for a reply. */
enum { START_PATIENCE_S = 60 };

static const char *runc_path(void)
{
	static const char *const places[] = { NODE_RUNC, "/usr/bin/runc", "/usr/sbin/runc",
					      "/usr/local/bin/runc", "/usr/local/sbin/runc", NULL };

	for (const char *const *place = places; *place; place++)
		if (!access(*place, X_OK))
			return *place;
	return "runc";
}

/* One line for the engine, where it looks for it: stderr, and runc's JSON log if one was asked for. */
static int fail(const struct command *command, const char *text)
{
	FILE *log = command->log ? fopen(command->log, "ae") : NULL;
	struct timespec now;
	struct tm utc;
	char stamp[32];

	fprintf(stderr, "runc-architect: %s\n", text);
	if (!log)
		return 1;
	clock_gettime(CLOCK_REALTIME, &now);
	gmtime_r(&now.tv_sec, &utc);
	strftime(stamp, sizeof stamp, "%Y-%m-%dT%H:%M:%SZ", &utc);
	fputs("{\"level\":\"error\",\"msg\":\"", log);
	for (; *text; text++) {
		if (*text == '"' || *text == '\\')
			fputc('\\', log);
		fputc((unsigned char)*text < 0x20 ? ' ' : *text, log);
	}
	fprintf(log, "\",\"time\":\"%s\"}\n", stamp);
	fclose(log);
	return 1;
}

_Noreturn void become_runc(const struct command *command)
{
	execvp(runc_path(), command->argv);
	fprintf(stderr, "runc-architect: cannot start runc: %s; install the package runc\n", strerror(errno));
	_exit(1);
}

/* Runs runc with the same arguments and returns its exit status. */
static int run_runc(const struct command *command)
{
	pid_t child = fork();
	int status;

	if (!child)
		become_runc(command);
	while (waitpid(child, &status, 0) < 0)
		if (errno != EINTR)
			return 1;
	return WIFEXITED(status) ? WEXITSTATUS(status) : 128 + WTERMSIG(status);
}

/* Tells the daemon of something that has happened; it finds out by itself if it is away now. */
static void tell(const char *verb, const char *id, int pid)
{
	char reply[MESSAGE_MAX];
	int fd = daemon_ask(&(struct request){ .verb = verb, .id = id, .pid = pid }, reply, sizeof reply);

	if (fd >= 0)
		close(fd);
}

static int phase_is(const char *status, const char *phase)
{
	const char *at = strstr(status, "phase=");

	return at && !strncmp(at + 6, phase, strlen(phase)) && at[6 + strlen(phase)] == ' ';
}

static int status_value(const char *status, const char *key)
{
	const char *at = strstr(status, key);

	return at ? atoi(at + strlen(key)) : 0;
}

/* ---- create ------------------------------------------------------------------------------------- */

static int bundle_mentions_us(const char *bundle)
{
	char path[MESSAGE_MAX];
	struct stat file;
	void *text;
	int fd, found = 0;

	snprintf(path, sizeof path, "%s/config.json", bundle);
	fd = open(path, O_RDONLY | O_CLOEXEC);
	if (fd < 0)
		return 0;
	if (!fstat(fd, &file) && file.st_size) {
		text = mmap(NULL, file.st_size, PROT_READ, MAP_PRIVATE, fd, 0);
		found = text != MAP_FAILED &&
			memmem(text, file.st_size, MANAGED_ANNOTATION, strlen(MANAGED_ANNOTATION)) != NULL;
	}
	close(fd);
	return found;
}

/* Asks architect-admit, the daemon's decision as a program of its own. */
static int admit_alone(const struct request *request, char *reply, size_t room)
{
	char engine[16];
	int output[2], status;
	ssize_t got;
	size_t have = 0;
	pid_t child;

	if (pipe2(output, O_CLOEXEC) || (child = fork()) < 0)
		return -1;
	if (!child) {
		dup2(output[1], STDOUT_FILENO);
		snprintf(engine, sizeof engine, "%d", request->pid);
		execl(ADMIT, ADMIT, request->id, request->bundle, request->root, engine, NULL);
		_exit(127);
	}
	close(output[1]);
	while (have + 1 < room && (got = read(output[0], reply + have, room - have - 1)) > 0)
		have += got;
	close(output[0]);
	reply[have] = 0;
	reply[strcspn(reply, "\n")] = 0;
	waitpid(child, &status, 0);
	return have && WIFEXITED(status) && WEXITSTATUS(status) == 0 ? 0 : -1;
}

/* Starts the keeper, which runs runc create. Returns its pid, or 0 if the create failed. */
static pid_t start_keeper(const struct command *command)
{
	char directory[MESSAGE_MAX], pid_file[MESSAGE_MAX + 16], ready[16], **argv;
	int pair[2], count = 0, code_read;
	char code = 1;
	pid_t keeper;

	snprintf(directory, sizeof directory, CONTAINERS_DIR "/%s", command->id);
	snprintf(pid_file, sizeof pid_file, "%s/init.pid", directory);
	argv = calloc(command->argc + 8, sizeof *argv);
	if (!argv || pipe2(pair, 0))
		return 0;
	snprintf(ready, sizeof ready, "%d", pair[1]);
	argv[count++] = KEEPER;
	argv[count++] = directory;
	argv[count++] = ready;
	argv[count++] = "--";
	argv[count++] = (char *)runc_path();
	for (int at = 1; at < command->argc; at++) {
		argv[count++] = command->argv[at];
		if (command->argv[at] == command->pid_file)
			argv[count - 1] = pid_file;
	}
	keeper = fork();
	if (!keeper) {
		close(pair[0]);
		execv(argv[0], argv);
		_exit(127);
	}
	close(pair[1]);
	do
		code_read = read(pair[0], &code, 1);
	while (code_read < 0 && errno == EINTR);
	close(pair[0]);
	free(argv);
	return keeper > 0 && code_read == 1 && !code ? keeper : 0;
}

static int write_pid_file(const char *path, pid_t pid)
{
	FILE *file = fopen(path, "we");

	if (!file)
		return -1;
	fprintf(file, "%d", pid);
	return fclose(file);
}

int verb_create(const struct command *command)
{
	char reply[MESSAGE_MAX], bundle[MESSAGE_MAX];
	struct request request = {
		.verb = "create", .id = command->id, .root = command->root, .pid = getppid()
	};
	pid_t keeper;
	int connection;

	if (!bundle_mentions_us(command->bundle) || !command->pid_file)
		become_runc(command);
	if (!realpath(command->bundle, bundle))
		return fail(command, "the bundle's path cannot be resolved");
	request.bundle = bundle;
	connection = daemon_ask(&request, reply, sizeof reply);
	if (connection >= 0)
		close(connection);
	else if (admit_alone(&request, reply, sizeof reply))
		return fail(command, "cannot decide whether the container is managed: neither architectd nor "
				     "architect-admit answers; run `architect check`");
	if (!strncmp(reply, "error ", 6))
		return fail(command, reply + 6);
	if (strcmp(reply, "ok managed"))
		become_runc(command);
	keeper = start_keeper(command);
	if (!keeper) {
		tell("deleted", command->id, 0);
		/* runc has written its own reason to the log that the engine gave it. */
		return 1;
	}
	if (write_pid_file(command->pid_file, keeper)) {
		kill(keeper, SIGKILL);
		return fail(command, "the pid file cannot be written");
	}
	tell("created", command->id, keeper);
	return 0;
}

/* ---- the other verbs ---------------------------------------------------------------------------- */

/* Whether the container is a pod's, whose node's daemon decides what a start and a stop mean: a checkpoint of
 * another node may take the place of what would be started, and what is stopped may move instead. */
static int is_movable(const struct command *command)
{
	char path[MESSAGE_MAX + 16];

	snprintf(path, sizeof path, CONTAINERS_DIR "/%s/movable", command->id);
	return !access(CLUSTER_MARK, F_OK) && !access(path, F_OK);
}

static long now_s(void)
{
	struct timespec now;

	clock_gettime(CLOCK_MONOTONIC, &now);
	return now.tv_sec;
}

/* Asks again while no daemon is there: one that is being replaced is back within seconds. Returns 0, or -1 if
 * there has been none for patience seconds, or if the container has ended. */
static int ask_patiently(const struct command *command, const struct request *request, char *reply, int patience)
{
	const struct timespec pause = { .tv_nsec = 100 * 1000 * 1000 };
	long last = now_s();
	int connection, keeper;

	for (;;) {
		long asked = now_s();

		connection = daemon_ask(request, reply, MESSAGE_MAX);
		if (connection >= 0) {
			close(connection);
			return 0;
		}
		if (now_s() > asked + 1) /* it was there, and died over the question */
			last = now_s();
		keeper = keeper_connect(command->id);
		if (keeper < 0 || now_s() - last >= patience)
			return -1;
		close(keeper);
		nanosleep(&pause, NULL);
	}
}

/* What is created in a cluster may be the place of a checkpoint that is on its way. Without the daemon nobody
 * can tell, and a program that were started anew would take that place: the kubelet tries again instead. */
static int start_by_daemon(const struct command *command)
{
	char reply[MESSAGE_MAX];

	if (ask_patiently(command, &(struct request){ .verb = "start", .id = command->id }, reply, START_PATIENCE_S))
		return fail(command, "start: architectd is not running, so it is unknown whether a checkpoint is on "
				     "its way to this container; see that architectd's pod runs on this node");
	if (!strncmp(reply, "error ", 6))
		return fail(command, reply + 6);
	return strcmp(reply, "ok landed") ? -1 : 0;
}

int verb_start(const struct command *command)
{
	int keeper = keeper_connect(command->id), code;

	if (keeper < 0)
		become_runc(command);
	close(keeper);
	if (is_movable(command)) {
		code = start_by_daemon(command);
		if (code >= 0)
			return code;
	}
	code = run_runc(command);
	if (!code)
		tell("started", command->id, 0);
	return code;
}

/* A probe of a hibernated container: what the engine sees is a process that ends well. Detached, it is the
 * engine's own child from the moment that this one has ended; it waits for that, since an engine learns of
 * the pid first. */
static int succeed(const struct command *command)
{
	int alive[2];
	pid_t child;
	char none;

	if (!command->detach || !command->pid_file)
		return 0;
	if (pipe2(alive, O_CLOEXEC) || (child = fork()) < 0)
		return fail(command, strerror(errno));
	if (!child) {
		close(alive[1]);
		(void)!read(alive[0], &none, 1);
		_exit(0);
	}
	if (write_pid_file(command->pid_file, child)) {
		kill(child, SIGKILL);
		return fail(command, "exec: the pid file cannot be written");
	}
	return 0;
}

/* Has the container woken if need be, then lets runc take over with the connection left open: it keeps
 * the container awake until runc is done with it. */
static int awake_then_runc(const struct command *command, const char *verb)
{
	char reply[MESSAGE_MAX];
	int keeper = keeper_connect(command->id), connection;

	if (keeper < 0)
		become_runc(command);
	connection = daemon_ask(
		&(struct request){ .verb = verb, .id = command->id, .process = command->process }, reply,
		sizeof reply);
	if (connection >= 0) {
		if (!strncmp(reply, "error ", 6))
			return fail(command, reply + 6);
		if (!strcmp(reply, "ok answered"))
			return succeed(command);
		fcntl(connection, F_SETFD, 0);
		close(keeper);
		become_runc(command);
	}
	if (!keeper_ask(keeper, "status", reply, sizeof reply) && phase_is(reply, "running")) {
		close(keeper);
		become_runc(command);
	}
	return fail(command, "the container is hibernated and architectd is not running; its state is safe; "
			     "start the daemon with `architect up`, then try again");
}

int verb_exec(const struct command *command)
{
	return awake_then_runc(command, "exec");
}

int verb_pause(const struct command *command)
{
	return awake_then_runc(command, "pause");
}

int verb_resume(const struct command *command)
{
	become_runc(command);
}

/* Standard input as a file that can be read twice, in its place. Returns it, or -1. */
static int keep_stdin(void)
{
	char some[MESSAGE_MAX];
	int copy = memfd_create("resources", MFD_CLOEXEC);
	ssize_t got;

	if (copy < 0)
		return -1;
	while ((got = read(STDIN_FILENO, some, sizeof some)) > 0)
		if (write(copy, some, got) != got)
			return -1;
	if (lseek(copy, 0, SEEK_SET) < 0 || dup2(copy, STDIN_FILENO) < 0)
		return -1;
	return copy;
}

/* What an update asks for, or NULL if that is not in a file or longer than a message. */
static const char *wanted_resources(const struct command *command)
{
	static char text[MESSAGE_MAX];
	ssize_t length;
	int file;

	if (!command->resources)
		return NULL;
	file = strcmp(command->resources, "-") ? open(command->resources, O_RDONLY | O_CLOEXEC) : keep_stdin();
	if (file < 0)
		return NULL;
	length = pread(file, text, sizeof text, 0);
	close(file);
	if (length <= 0 || length == sizeof text)
		return NULL;
	text[length] = 0;
	return text;
}

/* Changes the cgroup's limits, which a hibernated container has too: runc then takes the keeper for its
 * init. The daemon may know better: limits lowered for a sleeper would kill what has woken meanwhile. runc
 * writes its whole state back, with the init that it had read; the daemon sees to it that this is still the
 * right one.
 */
int verb_update(const struct command *command)
{
	char reply[MESSAGE_MAX];
	struct request request = { .verb = "update", .id = command->id };
	int keeper = keeper_connect(command->id), connection, code;

	if (keeper < 0)
		become_runc(command);
	close(keeper);
	request.resources = wanted_resources(command);
	connection = request.resources ? daemon_ask(&request, reply, sizeof reply) : -1;
	if (connection >= 0) {
		close(connection);
		if (!strncmp(reply, "error ", 6))
			return fail(command, reply + 6);
		if (!strcmp(reply, "ok skip"))
			return 0;
	}
	code = run_runc(command);
	tell("updated", command->id, 0);
	return code;
}

/* Prints runc's own answer with the keeper's pid in the place of the init's. */
static int print_running_state(const struct command *command, int keeper_pid)
{
	char text[1 << 16], *at;
	int output[2], status;
	size_t have = 0;
	ssize_t got;
	pid_t child;

	if (pipe2(output, O_CLOEXEC) || (child = fork()) < 0)
		return fail(command, strerror(errno));
	if (!child) {
		dup2(output[1], STDOUT_FILENO);
		become_runc(command);
	}
	close(output[1]);
	while (have + 1 < sizeof text && (got = read(output[0], text + have, sizeof text - have - 1)) > 0)
		have += got;
	text[have] = 0;
	waitpid(child, &status, 0);
	at = strstr(text, "\"pid\":");
	if (at && strtol(at + 6, NULL, 10) > 0) {
		char *rest = at + 6 + strspn(at + 6, " 0123456789");

		printf("%.*s \"pid\": %d%s", (int)(at - text), text, keeper_pid, rest);
	} else {
		fputs(text, stdout);
	}
	return WIFEXITED(status) ? WEXITSTATUS(status) : 1;
}

int verb_state(const struct command *command)
{
	char reply[MESSAGE_MAX];
	int keeper = keeper_connect(command->id);

	if (keeper < 0 || keeper_ask(keeper, "status", reply, sizeof reply))
		become_runc(command);
	if (phase_is(reply, "running") || phase_is(reply, "creating"))
		return print_running_state(command, status_value(reply, "keeper="));
	printf("{\"ociVersion\":\"1.0.2\",\"id\":\"%s\",\"pid\":%d,\"status\":\"running\",\"bundle\":\"%s\"}\n",
	       command->id, status_value(reply, "keeper="), command->bundle);
	return 0;
}

/* A pod's stop signal waits until it is known whether the pod ends or moves. Without the daemon it is left
 * where the next one finds it. Returns 1 if it is held. */
static int held_back(const struct command *command, int signal)
{
	char reply[MESSAGE_MAX], path[MESSAGE_MAX + 16];
	struct request request = { .verb = "stop", .id = command->id, .signal = signal };
	FILE *file;

	if (!is_movable(command))
		return 0;
	if (!ask_patiently(command, &request, reply, 0))
		return !strcmp(reply, "ok held");
	snprintf(path, sizeof path, CONTAINERS_DIR "/%s/stop", command->id);
	file = fopen(path, "we");
	if (!file)
		return 0;
	fprintf(file, "%d", signal);
	return !fclose(file);
}

int verb_kill(const struct command *command)
{
	char reply[MESSAGE_MAX], text[32];
	int keeper = keeper_connect(command->id), connection = -1;
	int signal = signal_number(command->signal ? command->signal : "TERM");

	if (keeper < 0 || keeper_ask(keeper, "status", reply, sizeof reply))
		become_runc(command);
	if (signal < 0)
		return fail(command, "kill: there is no such signal; give a number or a name such as TERM");
	if (signal && signal != SIGKILL && held_back(command, signal))
		return 0;
	/* Not by runc: the init may be frozen for a dump, and a signal that CRIU did not see is lost. */
	if (command->all && phase_is(reply, "running"))
		become_runc(command);
	if (signal && signal != SIGKILL && phase_is(reply, "hibernated")) {
		/* The daemon's wake is the better one: it checks the checkpoint, lifts limits and reports. The
		 * keeper can do without, and tries by itself if it must. */
		connection = daemon_ask(&(struct request){ .verb = "signal", .id = command->id }, reply, sizeof reply);
	}
	snprintf(text, sizeof text, "kill %d", signal);
	if (keeper_ask(keeper, text, reply, sizeof reply))
		reply[0] = 0; /* gone, as it was told */
	if (connection >= 0)
		close(connection);
	return strncmp(reply, "error", 5) ? 0 : fail(command, reply);
}

int verb_delete(const struct command *command)
{
	char reply[MESSAGE_MAX];
	int keeper = keeper_connect(command->id), code;

	if (keeper >= 0 && !keeper_ask(keeper, "status", reply, sizeof reply)) {
		if (!command->force && !phase_is(reply, "running") && !phase_is(reply, "creating"))
			return fail(command, "delete: the container is hibernated, not stopped; kill it first or use --force");
		if (command->force && !keeper_ask(keeper, "exit 137", reply, sizeof reply))
			keeper_await_exit(keeper);
	}
	code = run_runc(command);
	if (!code)
		tell("deleted", command->id, 0);
	return code;
}
