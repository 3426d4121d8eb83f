/* Reads an OCI runtime's command line (runc(8)) far enough to know what is asked of which container.
 * Called once by main.c. Everything unknown is left to runc.
 */
#define _GNU_SOURCE
#include "command.h"

#include <signal.h>
#include <stdlib.h>
#include <string.h>
#include <strings.h>

static const char *const global_with_value[] = { "--root", "--log", "--log-format", "--criu",
						  "--rootless", NULL };

/* Flags of create, exec and the like that take the next word; kill's and delete's take none. */
static const char *const verb_with_value[] = {
	"--bundle", "-b", "--pid-file", "--console-socket", "--preserve-fds", "--process", "-p", "--cwd",
	"--env", "-e", "--user", "-u", "--additional-gids", "-g", "--process-label", "--apparmor", "--cap",
	"-c", "--cgroup", "--format", "-f", "--resources", "-r", "--interval", "--image-path", "--work-path",
	"--parent-path", NULL
};

static int is_one_of(const char *word, const char *const *list)
{
	for (; *list; list++)
		if (!strcmp(word, *list))
			return 1;
	return 0;
}

/* The value of flag if word is it, as "--flag value" (from next) or "--flag=value"; else NULL. */
static const char *value_of(const char *word, const char *next, const char *flag)
{
	size_t length = strlen(flag);

	if (!strcmp(word, flag))
		return next;
	if (!strncmp(word, flag, length) && word[length] == '=')
		return word + length + 1;
	return NULL;
}

static void take(const char **field, const char *value)
{
	if (value)
		*field = value;
}

static int parse_globals(struct command *command)
{
	int at = 1;

	for (; at < command->argc && command->argv[at][0] == '-'; at++) {
		const char *word = command->argv[at];
		const char *next = at + 1 < command->argc ? command->argv[at + 1] : NULL;

		take(&command->root, value_of(word, next, "--root"));
		take(&command->log, value_of(word, next, "--log"));
		if (is_one_of(word, global_with_value))
			at++;
	}
	return at;
}

void command_parse(struct command *command, int argc, char **argv)
{
	int at, simple, words = 0;

	*command = (struct command){ .argc = argc, .argv = argv, .verb = "", .root = "/run/runc", .bundle = "." };
	at = parse_globals(command);
	if (at >= argc)
		return;
	command->verb_at = at;
	command->verb = argv[at];
	simple = !strcmp(command->verb, "kill") || !strcmp(command->verb, "delete");
	for (at++; at < argc; at++) {
		const char *word = argv[at], *next = at + 1 < argc ? argv[at + 1] : NULL;

		if (!strcmp(word, "--"))
			continue;
		if (word[0] != '-' || !word[1] || (simple && words)) {
			if (words == 0)
				command->id = word;
			else if (words == 1)
				command->signal = word;
			words++;
			/* What follows the id of an exec is the program and its own flags. */
			if (words == 1 && !strcmp(command->verb, "exec"))
				return;
			continue;
		}
		if (simple) {
			command->force |= !strcmp(word, "--force") || !strcmp(word, "-f");
			command->all |= !strcmp(word, "--all") || !strcmp(word, "-a");
			continue;
		}
		take(&command->bundle, value_of(word, next, "--bundle"));
		take(&command->bundle, value_of(word, next, "-b"));
		take(&command->pid_file, value_of(word, next, "--pid-file"));
		take(&command->process, value_of(word, next, "--process"));
		take(&command->process, value_of(word, next, "-p"));
		command->detach |= !strcmp(word, "--detach") || !strcmp(word, "-d");
		take(&command->resources, value_of(word, next, "--resources"));
		take(&command->resources, value_of(word, next, "-r"));
		if (is_one_of(word, verb_with_value))
			at++;
	}
}

int signal_number(const char *text)
{
	static const struct {
		const char *name;
		int number;
	} names[] = {
		{ "HUP", SIGHUP }, { "INT", SIGINT }, { "QUIT", SIGQUIT }, { "ILL", SIGILL },
		{ "TRAP", SIGTRAP }, { "ABRT", SIGABRT }, { "BUS", SIGBUS }, { "FPE", SIGFPE },
		{ "KILL", SIGKILL }, { "USR1", SIGUSR1 }, { "SEGV", SIGSEGV }, { "USR2", SIGUSR2 },
		{ "PIPE", SIGPIPE }, { "ALRM", SIGALRM }, { "TERM", SIGTERM }, { "CHLD", SIGCHLD },
		{ "CONT", SIGCONT }, { "STOP", SIGSTOP }, { "TSTP", SIGTSTP }, { "TTIN", SIGTTIN },
		{ "TTOU", SIGTTOU }, { "URG", SIGURG }, { "XCPU", SIGXCPU }, { "XFSZ", SIGXFSZ },
		{ "VTALRM", SIGVTALRM }, { "PROF", SIGPROF }, { "WINCH", SIGWINCH }, { "IO", SIGIO },
		{ "PWR", SIGPWR }, { "SYS", SIGSYS },
	};
	char *rest;
	long number = strtol(text, &rest, 10);

	if (rest != text && !*rest)
		return number >= 0 && number < NSIG ? (int)number : -1;
	if (!strncasecmp(text, "SIG", 3))
		text += 3;
	for (size_t i = 0; i < sizeof names / sizeof *names; i++)
		if (!strcasecmp(text, names[i].name))
			return names[i].number;
	if (!strncasecmp(text, "RTMIN", 5))
		return 34 + atoi(text + 5);
	return -1;
}
