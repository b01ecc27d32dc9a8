//! Sockets and network configuration beyond what the socket API gives.
