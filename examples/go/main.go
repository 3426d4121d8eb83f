// example-go is a small HTTP server whose state is in its memory alone: how often it was asked, since
// when it runs. Whoever asks it before and after a hibernation sees that it is the same process.
package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"log"
	"net/http"
	"os"
	"os/signal"
	"runtime"
	"sync/atomic"
	"syscall"
	"time"
)

const (
	address         = ":8080"
	tick            = time.Second
	readTimeout     = 10 * time.Second
	shutdownTimeout = 2 * time.Second
)

// example is the whole state of the server.
type example struct {
	start    time.Time
	requests atomic.Int64
	ticks    atomic.Int64
}

// count lets a runtime timer tick, as most Go programs have some: a hibernated process does not
// notice the time that passed, so the ticks say how long it was awake.
func (e *example) count(ctx context.Context) {
	ticker := time.NewTicker(tick)
	defer ticker.Stop()
	for {
		select {
		case <-ticker.C:
			e.ticks.Add(1)
		case <-ctx.Done():
			return
		}
	}
}

func (e *example) hello(w http.ResponseWriter, _ *http.Request) {
	n := e.requests.Add(1)
	fmt.Fprintf(w, "hello, request %d since %s\n", n, e.start.Format(time.RFC3339))
}

// status says what the Go runtime is at; it does not count as a request.
func (e *example) status(w http.ResponseWriter, _ *http.Request) {
	var memory runtime.MemStats
	runtime.ReadMemStats(&memory)
	w.Header().Set("Content-Type", "application/json")
	said := map[string]any{
		"go":            runtime.Version(),
		"start":         e.start.Format(time.RFC3339),
		"requests":      e.requests.Load(),
		"awake_seconds": e.ticks.Load(),
		"goroutines":    runtime.NumGoroutine(),
		"collections":   memory.NumGC,
		"heap_bytes":    memory.HeapAlloc,
	}
	if err := json.NewEncoder(w).Encode(said); err != nil {
		log.Printf("status: %v", err)
	}
}

// collect runs the garbage collector.
func (e *example) collect(w http.ResponseWriter, r *http.Request) {
	runtime.GC()
	e.status(w, r)
}

func (e *example) routes() http.Handler {
	mux := http.NewServeMux()
	mux.HandleFunc("GET /{$}", e.hello)
	mux.HandleFunc("GET /status", e.status)
	mux.HandleFunc("POST /collect", e.collect)
	mux.HandleFunc("GET /healthz", func(w http.ResponseWriter, _ *http.Request) {
		fmt.Fprintln(w, "ok")
	})
	return mux
}

func run() error {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	e := &example{start: time.Now().UTC()}
	go e.count(ctx)
	server := &http.Server{
		Addr:              address,
		Handler:           e.routes(),
		ReadHeaderTimeout: readTimeout,
	}
	ended := make(chan error, 1)
	go func() { ended <- server.ListenAndServe() }()
	log.Printf("serving on %s", address)
	select {
	case err := <-ended:
		return err
	case <-ctx.Done():
	}
	log.Print("ending: asked to")
	// Not of ctx, which is over.
	final, cancel := context.WithTimeout(context.Background(), shutdownTimeout)
	defer cancel()
	if err := server.Shutdown(final); err != nil {
		return err
	}
	if err := <-ended; !errors.Is(err, http.ErrServerClosed) {
		return err
	}
	return nil
}

func main() {
	if err := run(); err != nil {
		log.Fatal(err)
	}
}
