module architect.test/example-go

go 1.24.0
