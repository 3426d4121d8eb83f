/* runc-architect: the OCI runtime that engines call (containerd's shim, Podman's conmon).
 *
 * Why it exists: it is runc, but for containers that Architect manages. Those get a keeper as the process
 * that the engine knows, and verbs that reach them while they are hibernated. A container without our
 * annotation never touches anything here: runc takes this process over at once. It is static C because
 * an engine starts it for every create, start, exec, state, kill and delete.
 *
 * Called by engines only. What each verb does to a managed container is in verbs.c.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <stdio.h>
#include <string.h>
#include <unistd.h>

#include "command.h"
#include "verbs.h"

static const struct {
	const char *verb;
	int (*run)(const struct command *command);
} table[] = {
	{ "create", verb_create }, { "start", verb_start },   { "exec", verb_exec },
	{ "state", verb_state },   { "kill", verb_kill },     { "delete", verb_delete },
	{ "pause", verb_pause },   { "resume", verb_resume }, { "update", verb_update },
};

int main(int argc, char **argv)
{
	struct command command;

	command_parse(&command, argc, argv);
	for (size_t i = 0; command.id && i < sizeof table / sizeof *table; i++)
		if (!strcmp(command.verb, table[i].verb))
			return table[i].run(&command);
	become_runc(&command);
}
