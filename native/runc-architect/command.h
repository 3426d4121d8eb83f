/* The command line of an OCI runtime, as engines write it; see command.c. */
#ifndef ARCHITECT_COMMAND_H
#define ARCHITECT_COMMAND_H

struct command {
	int argc;
	char **argv;          /* as given, argv[0] included */
	int verb_at;          /* index of the verb, 0 if there is none */
	const char *verb;     /* "" if there is none */
	const char *id;       /* container id, NULL if there is none */
	const char *signal;   /* kill: the word after the id, NULL if there is none */
	const char *root;     /* --root; runc's default if not given */
	const char *log;      /* --log, or NULL */
	const char *bundle;   /* create: --bundle, "." if not given */
	const char *pid_file; /* create, exec: --pid-file, or NULL */
	const char *resources; /* update: --resources, or NULL */
	const char *process;  /* exec: --process, or NULL */
	int detach;           /* exec: --detach */
	int force;            /* delete: --force */
	int all;              /* kill: --all */
};

void command_parse(struct command *command, int argc, char **argv);
/* Number of a signal written as 15, TERM or SIGTERM; -1 if there is no such signal. */
int signal_number(const char *text);

#endif
