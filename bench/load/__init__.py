"""The load generator behind `lightqwen bench`: drives a running server over gRPC and reports what its users feel.

It is a client like any other: of ours it imports only `lightqwen.client` and `bench.workloads`. `options` is what one
can ask for, `requests` and `trace` what is sent and when, `fleet` and `sender` the processes that send it, `metrics`
what the figures mean, `report` and `page` how they are shown, `command` the whole from beginning to end.
"""
