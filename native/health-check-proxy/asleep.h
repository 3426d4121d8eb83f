/* Whether a container is hibernated. */
#ifndef PROXY_ASLEEP_H
#define PROXY_ASLEEP_H

/* The longest name of a container: sun_path(unix(7)) less what stands before it. */
enum { CONTAINER_NAME_MAX = 90 };

/* 1 from the beginning of the container's dump until its program runs again, else 0. */
int asleep(const char *container);

#endif
