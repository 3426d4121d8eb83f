/* A name in the pod's network namespace while a mapping's app is not known to be healthy; see failing.c. */
#ifndef PROXY_FAILING_H
#define PROXY_FAILING_H

#include <stdint.h>

/* Takes the name, or gives it up. `*fd` is -1 while it is not held. */
void failing_tell(int *fd, const char *container, uint16_t shadow_port, int failing);

#endif
