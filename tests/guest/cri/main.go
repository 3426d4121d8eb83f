// Command cri makes one call of the Container Runtime Interface, as a kubelet would.
//
//	cri SOCKET SERVICE METHOD REQUEST
//
// REQUEST is the request as JSON (protobuf's own mapping, proto names allowed); the response is printed
// likewise. Any method of k8s.io/cri-api that is not a stream can be called. Built by payload.py and run
// in a guest by node_path.py; crictl is not used because it neither takes every field nor shows it.
package main

import (
	"context"
	"fmt"
	"os"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/protobuf/encoding/protojson"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/reflect/protoreflect"
	"google.golang.org/protobuf/reflect/protoregistry"
	_ "k8s.io/cri-api/pkg/apis/runtime/v1"
)

// Emulated code is slow: only what hangs takes so long.
const deadline = 5 * time.Minute

func message(name protoreflect.FullName) (proto.Message, error) {
	kind, err := protoregistry.GlobalTypes.FindMessageByName(name)
	if err != nil {
		return nil, fmt.Errorf("%s: %w", name, err)
	}
	return kind.New().Interface(), nil
}

func call(socket, service, method, text string) (string, error) {
	name := protoreflect.FullName("runtime.v1." + service + "." + method)
	found, err := protoregistry.GlobalFiles.FindDescriptorByName(name)
	if err != nil {
		return "", fmt.Errorf("%s: %w", name, err)
	}
	kind, ok := found.(protoreflect.MethodDescriptor)
	if !ok {
		return "", fmt.Errorf("%s is no method", name)
	}
	request, err := message(kind.Input().FullName())
	if err != nil {
		return "", err
	}
	response, err := message(kind.Output().FullName())
	if err != nil {
		return "", err
	}
	if err := protojson.Unmarshal([]byte(text), request); err != nil {
		return "", err
	}
	connection, err := grpc.NewClient("unix://"+socket, grpc.WithTransportCredentials(insecure.NewCredentials()))
	if err != nil {
		return "", err
	}
	defer connection.Close()
	ctx, cancel := context.WithTimeout(context.Background(), deadline)
	defer cancel()
	path := "/runtime.v1." + service + "/" + method
	if err := connection.Invoke(ctx, path, request, response, grpc.WaitForReady(true)); err != nil {
		return "", err
	}
	encoded, err := protojson.MarshalOptions{UseProtoNames: true, EmitUnpopulated: true}.Marshal(response)
	return string(encoded), err
}

func main() {
	if len(os.Args) != 5 {
		fmt.Fprintln(os.Stderr, "usage: cri SOCKET SERVICE METHOD REQUEST")
		os.Exit(2)
	}
	answer, err := call(os.Args[1], os.Args[2], os.Args[3], os.Args[4])
	if err != nil {
		fmt.Fprintln(os.Stderr, "cri:", err)
		os.Exit(1)
	}
	fmt.Println(answer)
}
