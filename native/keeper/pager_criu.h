/* The pager's end of CRIU's lazy-pages.socket; see pager_criu.c. */
#ifndef ARCHITECT_PAGER_CRIU_H
#define ARCHITECT_PAGER_CRIU_H

/* Listens where CRIU looks; the descriptor goes to shared->listener. Returns 0 or -errno. */
int criu_listen(void);
/* CRIU connects: the listener gives way to shared->connection. Returns whether it did. */
int criu_accept(void);

enum criu_news { CRIU_NONE, CRIU_RUNNING, CRIU_LOST };
/* Takes what CRIU has sent: processes are adopted. CRIU_RUNNING: they all run now. CRIU_LOST: CRIU gave up,
 * or sent what cannot be served; *error says why. */
enum criu_news criu_read(int *error);

/* Takes what CRIU has sent for a restore that is given up: the processes are recorded, not served. Returns
 * whether nothing more can come. */
int criu_drain(void);
/* Closes both sockets and removes the name from the directory. Only after the last word, or criu_drain. */
void criu_hang_up(void);
/* Finds the sockets of a pager that was killed, recorded or not. */
void criu_recover(void);

#endif
