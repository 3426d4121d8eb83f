/* One HTTP/1 request and its answer. */
#ifndef PROXY_HTTP1_H
#define PROXY_HTTP1_H

struct probe;
struct http1;

struct http1 *http1_new(struct probe *probe);
void http1_free(struct http1 *http1);
/* 1 when the client has its answer, BLOCKED, or FAILED if the connection is to be closed. */
int http1_step(struct http1 *http1);

#endif
