"""What programs outside the server import: the client, and the stubs of the contract in `lightqwen.v1`."""
