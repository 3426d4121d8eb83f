/* The verbs of an OCI runtime, for containers that may be managed; see verbs.c. */
#ifndef ARCHITECT_VERBS_H
#define ARCHITECT_VERBS_H

#include "command.h"

/* Each returns the exit status of runc-architect, or does not return because runc took over. */
int verb_create(const struct command *command);
int verb_start(const struct command *command);
int verb_exec(const struct command *command);
int verb_state(const struct command *command);
int verb_kill(const struct command *command);
int verb_delete(const struct command *command);
int verb_pause(const struct command *command);
int verb_resume(const struct command *command);
int verb_update(const struct command *command);

/* Replaces this process by runc with the same arguments. */
_Noreturn void become_runc(const struct command *command);

#endif
