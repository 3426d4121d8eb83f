/* TLS 1.2 and 1.3 with OpenSSL.
 *
 * Why a certificate of its own making, and why nothing is verified: the kubelet verifies no certificate when it
 * probes (its documentation of HTTP probes), so what stands between it and the app need not either.
 *
 * Everything is made when it is first needed: a pod without HTTPS probes pays nothing for it.
 *
 * Called by stream.c.
 */
#include "tls.h"

#include <openssl/err.h>
#include <openssl/evp.h>
#include <openssl/ssl.h>
#include <openssl/x509.h>

#include "say.h"

enum { DAY_S = 24 * 3600, VALID_DAYS = 3650 };

static const unsigned char protocol_http1[] = "\x08http/1.1", protocol_http2[] = "\x02h2";

static _Noreturn void fail_tls(const char *what)
{
	char reason[256];

	ERR_error_string_n(ERR_get_error(), reason, sizeof reason);
	fail(1, "%s: %s", what, reason);
}

static void certify(SSL_CTX *context)
{
	static const unsigned char name[] = "architect-health-check-proxy";
	EVP_PKEY *key = EVP_EC_gen("P-256");
	X509 *certificate = X509_new();
	X509_NAME *subject;

	if (!key || !certificate)
		fail_tls("no certificate can be made");
	subject = X509_get_subject_name(certificate);
	X509_set_version(certificate, X509_VERSION_3);
	ASN1_INTEGER_set(X509_get_serialNumber(certificate), 1);
	/* Yesterday: clocks differ. */
	X509_gmtime_adj(X509_getm_notBefore(certificate), -DAY_S);
	X509_gmtime_adj(X509_getm_notAfter(certificate), (long)VALID_DAYS * DAY_S);
	X509_NAME_add_entry_by_txt(subject, "CN", MBSTRING_ASC, name, -1, -1, 0);
	X509_set_issuer_name(certificate, subject);
	X509_set_pubkey(certificate, key);
	if (!X509_sign(certificate, key, EVP_sha256()) || SSL_CTX_use_certificate(context, certificate) != 1 ||
	    SSL_CTX_use_PrivateKey(context, key) != 1)
		fail_tls("no certificate can be made");
	X509_free(certificate);
	EVP_PKEY_free(key);
}

/* HTTP/1.1 where the client offers it: HTTP/2 is for gRPC, whose clients offer nothing else. */
static int choose_protocol(SSL *tls, const unsigned char **chosen, unsigned char *length,
			   const unsigned char *offered, unsigned offered_length, void *unused)
{
	static const unsigned char known[] = "\x08http/1.1\x02h2";

	(void)tls, (void)unused;
	if (SSL_select_next_proto((unsigned char **)chosen, length, known, sizeof known - 1, offered,
				  offered_length) != OPENSSL_NPN_NEGOTIATED)
		return SSL_TLSEXT_ERR_NOACK;
	return SSL_TLSEXT_ERR_OK;
}

/* Any ClientHello's name will do: the app's own server is to judge it. */
static int accept_name(SSL *tls, int *alert, void *unused)
{
	(void)tls, (void)alert, (void)unused;
	return SSL_TLSEXT_ERR_OK;
}

static SSL_CTX *new_context(const SSL_METHOD *method)
{
	SSL_CTX *context;

	/* No configuration of the machine's or the image's has a say here. */
	OPENSSL_init_ssl(OPENSSL_INIT_NO_LOAD_CONFIG, NULL);
	context = SSL_CTX_new(method);
	if (!context)
		fail_tls("TLS cannot be set up");
	SSL_CTX_set_min_proto_version(context, TLS1_2_VERSION);
	SSL_CTX_set_mode(context, SSL_MODE_ENABLE_PARTIAL_WRITE | SSL_MODE_ACCEPT_MOVING_WRITE_BUFFER |
					  SSL_MODE_RELEASE_BUFFERS);
	/* A probe comes once: sessions to resume would only be kept. */
	SSL_CTX_set_options(context, SSL_OP_NO_RENEGOTIATION | SSL_OP_NO_TICKET);
	SSL_CTX_set_session_cache_mode(context, SSL_SESS_CACHE_OFF);
	return context;
}

SSL *tls_server(int fd)
{
	static SSL_CTX *context;
	SSL *tls;

	if (!context) {
		context = new_context(TLS_server_method());
		certify(context);
		SSL_CTX_set_num_tickets(context, 0);
		SSL_CTX_set_alpn_select_cb(context, choose_protocol, NULL);
		SSL_CTX_set_tlsext_servername_callback(context, accept_name);
	}
	tls = SSL_new(context);
	if (tls && !SSL_set_fd(tls, fd)) {
		SSL_free(tls);
		return NULL;
	}
	return tls;
}

SSL *tls_client(int fd, const char *name, int http2)
{
	static SSL_CTX *context;
	SSL *tls;

	if (!context) {
		context = new_context(TLS_client_method());
		SSL_CTX_set_verify(context, SSL_VERIFY_NONE, NULL);
		/* Nor does it matter how weak a certificate is that nobody verifies. */
		SSL_CTX_set_security_level(context, 0);
	}
	tls = SSL_new(context);
	if (tls && (!SSL_set_fd(tls, fd) || (*name && !SSL_set_tlsext_host_name(tls, name)) ||
		    SSL_set_alpn_protos(tls, http2 ? protocol_http2 : protocol_http1,
					http2 ? sizeof protocol_http2 - 1 : sizeof protocol_http1 - 1))) {
		SSL_free(tls);
		return NULL;
	}
	return tls;
}
