/* A connection with HTTP/2: gRPC's health checks, one after the other. */
#ifndef PROXY_GRPC_H
#define PROXY_GRPC_H

struct probe;
struct grpc;

struct grpc *grpc_new(struct probe *probe);
void grpc_free(struct grpc *grpc);
/* 1 when the client has closed, BLOCKED, or FAILED if the connection is to be closed. */
int grpc_step(struct grpc *grpc);

#endif
