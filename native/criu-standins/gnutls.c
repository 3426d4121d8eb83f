/* libgnutls.so.30, as far as CRIU asks for it: what stands in for the library while containers are dumped
 * and restored.
 *
 * Why it exists: CRIU is linked with gnutls for page servers that are reached over the network, encrypted,
 * and with nftables (nftables.c) to lock networks; architect uses neither. The two bring eleven libraries
 * more into each start of CRIU, which is a wake's largest single piece of waiting: this halves it.
 *
 * Every function answers as the library does when it fails, so that CRIU gives up cleanly if one is ever
 * called. Loaded by CRIU from the copy in memory (src/architect/adapters/hot.py); the bundle on the disk
 * keeps the real libraries, and what CRIU finds out about the kernel is found out with those. */

enum { GNUTLS_E_UNIMPLEMENTED_FEATURE = -1250 }; /* gnutls/gnutls.h */

#define FAILS(name) int name(void) { return GNUTLS_E_UNIMPLEMENTED_FEATURE; }
#define DOES_NOTHING(name) void name(void) { }

/* A variable of the library: CRIU has it copied into itself at its start. */
void (*gnutls_free)(void *);

FAILS(gnutls_bye)
FAILS(gnutls_certificate_allocate_credentials)
DOES_NOTHING(gnutls_certificate_free_credentials)
DOES_NOTHING(gnutls_certificate_send_x509_rdn_sequence)
DOES_NOTHING(gnutls_certificate_server_set_request)
FAILS(gnutls_certificate_set_x509_crl_file)
FAILS(gnutls_certificate_set_x509_key_file)
FAILS(gnutls_certificate_set_x509_system_trust)
FAILS(gnutls_certificate_set_x509_trust_file)
FAILS(gnutls_certificate_type_get)
FAILS(gnutls_certificate_verification_status_print)
FAILS(gnutls_certificate_verify_peers3)
FAILS(gnutls_credentials_set)
DOES_NOTHING(gnutls_deinit)

int gnutls_error_is_fatal(int error)
{
	return error < 0;
}

FAILS(gnutls_handshake)
FAILS(gnutls_init)
DOES_NOTHING(gnutls_packet_deinit)
DOES_NOTHING(gnutls_packet_get)

unsigned long gnutls_record_check_pending(void)
{
	return 0;
}

long gnutls_record_recv(void)
{
	return GNUTLS_E_UNIMPLEMENTED_FEATURE;
}

long gnutls_record_recv_packet(void)
{
	return GNUTLS_E_UNIMPLEMENTED_FEATURE;
}

long gnutls_record_send(void)
{
	return GNUTLS_E_UNIMPLEMENTED_FEATURE;
}

FAILS(gnutls_set_default_priority)

const char *gnutls_strerror(int error)
{
	(void)error;
	return "architect's CRIU has no encrypted page server";
}

DOES_NOTHING(gnutls_transport_set_ptr)
DOES_NOTHING(gnutls_transport_set_pull_function)
DOES_NOTHING(gnutls_transport_set_push_function)
