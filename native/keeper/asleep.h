/* A name in the pod's network namespace while the container's program is away; see asleep.c. */
#ifndef ARCHITECT_ASLEEP_H
#define ARCHITECT_ASLEEP_H

/* Take the name of that container. Nothing is done without a name, or if somebody has it. */
void asleep_begin(const char *container);
/* Give it up. */
void asleep_end(void);

#endif
