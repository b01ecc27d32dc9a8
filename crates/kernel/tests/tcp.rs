//! TCP connections taken apart and put together again, in network namespaces of the tests' own.
//!
//! Every test has real connections over a loopback interface; the peer is an ordinary socket that
//! must not notice anything. Needs root.

use std::io::{Read, Write};
use std::net::{Shutdown, SocketAddr, TcpListener, TcpStream};
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::process::Command;
use std::time::{Duration, Instant};

use limosa_kernel::namespace::{self, Kind};
use limosa_kernel::net::nft::{self, PacketLock, Scope};
use limosa_kernel::net::sock_diag::Diag;
use limosa_kernel::net::sockopt::{self, Phase};
use limosa_kernel::net::tcp_rebuild::{probe, rebuild, resume};
use limosa_kernel::net::tcp_repair::{self, State};
use limosa_kernel::net::tcp_snapshot::{self, Snapshot, abandon};

/// Runs `test` in a thread with a network namespace of its own, whose loopback interface is up.
fn in_namespace(test: impl FnOnce() + Send + 'static) {
    let thread = std::thread::spawn(|| {
        namespace::unshare(&[Kind::Network]).expect("unshare(CLONE_NEWNET), needs root");
        let up = Command::new("ip").args(["link", "set", "lo", "up"]).status().unwrap();
        assert!(up.success());
        test();
    });
    if let Err(panic) = thread.join() {
        std::panic::resume_unwind(panic);
    }
}

fn connected(address: &str) -> (TcpStream, TcpStream) {
    let listener = TcpListener::bind(address).unwrap();
    let client = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
    let (server, _) = listener.accept().unwrap();
    for stream in [&client, &server] {
        stream.set_read_timeout(Some(Duration::from_secs(20))).unwrap();
    }
    (client, server)
}

fn tuple(stream: &TcpStream) -> (SocketAddr, SocketAddr) {
    (stream.local_addr().unwrap(), stream.peer_addr().unwrap())
}

fn take(stream: &impl AsFd) -> Snapshot {
    tcp_snapshot::take(&[stream.as_fd()]).unwrap().remove(0).unwrap()
}

fn state(socket: &impl AsFd) -> State {
    tcp_repair::info(socket).unwrap().state
}

fn wait_for(socket: &impl AsFd, wanted: State) {
    let limit = Instant::now() + Duration::from_secs(5);
    while state(socket) != wanted {
        assert!(Instant::now() < limit, "{:?} instead of {wanted:?}", state(socket));
        std::thread::sleep(Duration::from_millis(1));
    }
}

fn pattern(length: usize, seed: usize) -> Vec<u8> {
    (0..length).map(|at| (at * 31 + at / 251 + seed) as u8).collect()
}

/// Captures `stream`, ends it without a packet, makes it again.
fn replace(stream: TcpStream, lock: PacketLock) -> (TcpStream, Snapshot) {
    let options = sockopt::capture(&stream).unwrap();
    let snapshot = take(&stream);
    abandon(stream.as_fd()).unwrap();
    drop(stream);
    let rebuilt = rebuild(&snapshot, |fd| sockopt::apply(fd, &options, Phase::BeforeBind)).unwrap();
    lock.release();
    resume(&rebuilt.socket, &snapshot, false).unwrap();
    probe(&rebuilt.socket, false).unwrap();
    sockopt::apply(&rebuilt.socket, &options, Phase::Last).unwrap();
    (TcpStream::from(rebuilt.socket), snapshot)
}

/// Both queues full, the peer reading and writing on: what `address` says decides the family.
fn both_queues(address: &str) {
    let (mut client, mut server) = connected(address);
    client.set_nodelay(true).unwrap();
    let to_server = pattern(1_000_000, 1);
    let to_client = pattern(100_000, 2);
    server.write_all(&to_client).unwrap();
    std::thread::sleep(Duration::from_millis(20));
    // Packets leave and get lost, so that what is written stays in the send queue, sent and unsent.
    let rules = "table inet lossy { chain in { type filter hook input priority -400\n drop\n }\n }";
    assert!(Command::new("nft").arg(rules).status().unwrap().success());
    client.set_nonblocking(true).unwrap();
    let mut written = 0;
    while written < to_server.len() {
        match client.write(&to_server[written..]) {
            Ok(count) => written += count,
            Err(error) if error.kind() == std::io::ErrorKind::WouldBlock => break,
            Err(error) => panic!("{error}"),
        }
    }
    client.set_nonblocking(false).unwrap();
    let lock = PacketLock::new("queues", Scope::Connections(&[tuple(&client)])).unwrap();
    assert!(Command::new("nft").args(["delete", "table", "inet", "lossy"]).status().unwrap().success());
    let (mut client, snapshot) = replace(client, lock);
    assert_eq!(snapshot.receive_queue, to_client);
    assert_eq!(snapshot.send_queue, to_server[..written]);
    assert!(snapshot.unsent > 0 && snapshot.unsent < written, "{} of {written} unsent", snapshot.unsent);
    assert!(client.nodelay().unwrap());

    let mut got = vec![0; to_client.len()];
    client.read_exact(&mut got).unwrap();
    assert!(got == to_client);
    let mut got = vec![0; written];
    server.read_exact(&mut got).unwrap();
    assert!(got == to_server[..written]);
    // And on, both ways.
    for round in 0..50 {
        let message = pattern(10_000, round);
        let mut echo = vec![0; message.len()];
        client.write_all(&message).unwrap();
        server.read_exact(&mut echo).unwrap();
        assert!(echo == message);
        server.write_all(&message).unwrap();
        client.read_exact(&mut echo).unwrap();
        assert!(echo == message);
    }
    assert_eq!(take(&client).options, snapshot.options);
    drop(client);
    assert_eq!(server.read(&mut [0]).unwrap(), 0);
}

#[test]
fn both_queues_over_ipv4() {
    in_namespace(|| both_queues("127.0.0.1:0"));
}

#[test]
fn both_queues_over_ipv6() {
    in_namespace(|| both_queues("[::1]:0"));
}

#[test]
fn both_queues_over_a_mapped_address() {
    in_namespace(|| {
        both_queues("[::ffff:127.0.0.1]:0");
    });
}

#[test]
fn a_snapshot_leaves_no_trace() {
    in_namespace(|| {
        let (mut client, mut server) = connected("127.0.0.1:0");
        rustix::net::sockopt::set_socket_reuseaddr(&client, true).unwrap();
        server.write_all(b"hello").unwrap();
        std::thread::sleep(Duration::from_millis(10));
        let first = take(&client);
        let second = take(&client);
        assert_eq!(Snapshot { timestamp: 0, ..second }, Snapshot { timestamp: 0, ..first.clone() });
        assert!(!tcp_repair::in_repair(&client).unwrap());
        assert!(rustix::net::sockopt::socket_reuseaddr(&client).unwrap());
        assert_eq!(first.receive_queue, b"hello");
        let mut got = [0; 5];
        client.read_exact(&mut got).unwrap();
        client.write_all(b"world").unwrap();
        server.read_exact(&mut got).unwrap();
        assert_eq!(&got, b"world");
    });
}

#[test]
fn half_closed_states_come_back() {
    in_namespace(|| {
        for address in ["127.0.0.1:0", "[::1]:0"] {
            close_wait(address);
            fin_wait_2(address);
            fin_wait_1(address);
            last_ack(address);
            closing(address);
        }
    });
}

fn close_wait(address: &str) {
    let (client, mut server) = connected(address);
    server.write_all(b"the last words").unwrap();
    server.shutdown(Shutdown::Write).unwrap();
    wait_for(&client, State::CloseWait);
    let lock = PacketLock::new("cw", Scope::Namespace).unwrap();
    let (mut client, _) = replace(client, lock);
    assert_eq!(state(&client), State::CloseWait);
    let mut text = String::new();
    client.read_to_string(&mut text).unwrap();
    assert_eq!(text, "the last words");
    client.write_all(b"answer").unwrap();
    drop(client);
    text.clear();
    server.read_to_string(&mut text).unwrap();
    assert_eq!(text, "answer");
}

fn fin_wait_2(address: &str) {
    let (client, mut server) = connected(address);
    client.shutdown(Shutdown::Write).unwrap();
    wait_for(&client, State::FinWait2);
    let lock = PacketLock::new("fw2", Scope::Namespace).unwrap();
    let (mut client, _) = replace(client, lock);
    assert_eq!(state(&client), State::FinWait2);
    server.write_all(b"still talking").unwrap();
    drop(server);
    let mut text = String::new();
    client.read_to_string(&mut text).unwrap();
    assert_eq!(text, "still talking");
}

fn fin_wait_1(address: &str) {
    let (mut client, mut server) = connected(address);
    let lock = PacketLock::new("fw1", Scope::Namespace).unwrap();
    client.write_all(b"words and a FIN").unwrap();
    client.shutdown(Shutdown::Write).unwrap();
    assert_eq!(state(&client), State::FinWait1);
    let (client, snapshot) = replace(client, lock);
    assert_eq!(snapshot.send_queue, b"words and a FIN");
    let mut text = String::new();
    server.read_to_string(&mut text).unwrap();
    assert_eq!(text, "words and a FIN");
    wait_for(&client, State::FinWait2);
}

fn last_ack(address: &str) {
    let (mut client, mut server) = connected(address);
    server.shutdown(Shutdown::Write).unwrap();
    wait_for(&client, State::CloseWait);
    let lock = PacketLock::new("la", Scope::Namespace).unwrap();
    client.write_all(b"bye").unwrap();
    client.shutdown(Shutdown::Write).unwrap();
    assert_eq!(state(&client), State::LastAck);
    let (client, _) = replace(client, lock);
    let mut text = String::new();
    server.read_to_string(&mut text).unwrap();
    assert_eq!(text, "bye");
    wait_for(&client, State::Close);
}

fn closing(address: &str) {
    let (client, server) = connected(address);
    // Both FINs cross: ours is lost, the peer's arrives as data that acknowledges nothing.
    let lock = PacketLock::new("c1", Scope::Namespace).unwrap();
    client.shutdown(Shutdown::Write).unwrap();
    assert_eq!(state(&client), State::FinWait1);
    server.shutdown(Shutdown::Write).unwrap();
    lock.release();
    // Whoever's timer is first, one of the two is in CLOSING or both come through; catch it if it happens.
    let limit = Instant::now() + Duration::from_secs(2);
    while state(&client) == State::FinWait1 && Instant::now() < limit {}
    if state(&client) == State::Closing {
        let lock = PacketLock::new("c2", Scope::Namespace).unwrap();
        if state(&client) == State::Closing {
            let (client, _) = replace(client, lock);
            wait_for(&client, State::Close);
        }
    }
}

#[test]
fn a_connection_being_made_is_made() {
    in_namespace(|| {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap();
        let lock = PacketLock::new("syn", Scope::Namespace).unwrap();
        let socket = rustix::net::socket_with(
            rustix::net::AddressFamily::INET,
            rustix::net::SocketType::STREAM,
            rustix::net::SocketFlags::NONBLOCK,
            None,
        )
        .unwrap();
        assert_eq!(rustix::net::connect(&socket, &address), Err(rustix::io::Errno::INPROGRESS));
        let snapshot = take(&socket);
        assert_eq!((snapshot.state, snapshot.remote), (State::SynSent, address));
        abandon(socket.as_fd()).unwrap();
        drop(socket);
        let rebuilt = rebuild(&snapshot, |_| Ok(())).unwrap();
        lock.release();
        resume(&rebuilt.socket, &snapshot, false).unwrap();
        let (mut server, peer) = listener.accept().unwrap();
        assert_eq!(peer, snapshot.local);
        let mut client = TcpStream::from(rebuilt.socket);
        client.set_nonblocking(false).unwrap();
        client.write_all(b"x").unwrap();
        server.read_exact(&mut [0]).unwrap();
    });
}

#[test]
fn a_large_receive_queue_comes_back_whole() {
    in_namespace(|| {
        let (mut client, mut server) = connected("127.0.0.1:0");
        rustix::net::sockopt::set_socket_recv_buffer_size_force(&client, 4 << 20).unwrap();
        let data = pattern(3 << 20, 7);
        server.set_nonblocking(true).unwrap();
        let mut written = 0;
        let limit = Instant::now() + Duration::from_millis(500);
        while written < data.len() && Instant::now() < limit {
            written += server.write(&data[written..]).unwrap_or(0);
        }
        server.set_nonblocking(false).unwrap();
        let lock = PacketLock::new("large", Scope::Namespace).unwrap();
        let (client_again, snapshot) = replace(client, lock);
        client = client_again;
        println!("receive queue of {} bytes", snapshot.receive_queue.len());
        assert!(snapshot.receive_queue.len() > 500_000);
        let mut got = vec![0; written];
        client.read_exact(&mut got).unwrap();
        assert!(got == data[..written]);
    });
}

#[test]
fn the_lock_drops_and_falls_with_its_owner() {
    in_namespace(|| {
        let (mut client, mut server) = connected("127.0.0.1:0");
        let (mut other, mut other_server) = connected("127.0.0.1:0");
        let tables = || {
            let listed = Command::new("nft").args(["list", "ruleset"]).output().unwrap();
            String::from_utf8(listed.stdout).unwrap()
        };
        let lock = PacketLock::new("test", Scope::Connections(&[tuple(&client)])).unwrap();
        assert!(tables().contains("limosa-test"), "{}", tables());
        server.set_read_timeout(Some(Duration::from_millis(100))).unwrap();
        client.write_all(b"a").unwrap();
        assert!(server.read(&mut [0]).is_err(), "the lock let a packet pass");
        other.write_all(b"b").unwrap();
        other_server.read_exact(&mut [0]).unwrap();

        lock.leave_behind("left", &[tuple(&client)], Duration::from_mins(10)).unwrap();
        assert!(tables().contains("limosa-left") && !tables().contains("limosa-test"));
        assert!(server.read(&mut [0]).is_err(), "the lock left behind let a packet pass");
        assert!(nft::remove("left").unwrap());
        assert!(!nft::remove("left").unwrap());
        server.set_read_timeout(Some(Duration::from_secs(10))).unwrap();
        server.read_exact(&mut [0]).unwrap();

        // A lock left behind ends by itself.
        let lock = PacketLock::new("test", Scope::Namespace).unwrap();
        lock.leave_behind("left", &[tuple(&client)], Duration::from_millis(300)).unwrap();
        client.write_all(b"a").unwrap();
        server.read_exact(&mut [0]).unwrap();
        assert!(nft::remove("left").unwrap());
        assert_eq!(tables(), "");
    });
}

#[test]
fn options_are_set_again_and_others_are_refused() {
    use rustix::net::sockopt as set;
    in_namespace(|| {
        let (client, _server) = connected("[::1]:0");
        set::set_socket_keepalive(&client, true).unwrap();
        set::set_tcp_keepidle(&client, Duration::from_secs(77)).unwrap();
        set::set_tcp_user_timeout(&client, 12_345).unwrap();
        set::set_socket_linger(&client, Some(Duration::from_secs(3))).unwrap();
        set::set_socket_recv_buffer_size(&client, 50_000).unwrap();
        set::set_ipv6_tclass(&client, 0x20).unwrap();
        client.set_read_timeout(Some(Duration::from_millis(1_500))).unwrap();
        let options = sockopt::capture(&client).unwrap();
        let fresh: OwnedFd = rustix::net::socket_with(
            rustix::net::AddressFamily::INET6,
            rustix::net::SocketType::STREAM,
            rustix::net::SocketFlags::CLOEXEC,
            None,
        )
        .unwrap();
        sockopt::apply(&fresh, &options, Phase::BeforeBind).unwrap();
        sockopt::apply(&fresh, &options, Phase::Last).unwrap();
        assert_eq!(sockopt::capture(&fresh).unwrap(), options);
        assert_eq!(set::tcp_keepidle(&fresh).unwrap(), Duration::from_secs(77));
        assert!(options.iter().all(|option| sockopt::label(option).is_some()));

        let mut evil = options.clone();
        evil.push(sockopt::SocketOption {
            level: libc::SOL_SOCKET,
            name: libc::SO_ATTACH_BPF,
            value: vec![0; 4],
        });
        assert!(sockopt::apply(&fresh, &evil, Phase::Last).is_err());
        let mut short = options;
        short[0].value.pop();
        assert!(
            sockopt::apply(&fresh, &short, Phase::BeforeBind).is_err()
                || sockopt::apply(&fresh, &short, Phase::Last).is_err()
        );
    });
}

#[test]
fn new_connections_wait_for_the_lock_to_fall() {
    in_namespace(|| {
        for address in ["127.0.0.1:0", "[::1]:0"] {
            let listener = TcpListener::bind(address).unwrap();
            let local = listener.local_addr().unwrap();
            let free = TcpListener::bind(address).unwrap();
            let mut client = TcpStream::connect(local).unwrap();
            let lock = PacketLock::new("listen", Scope::NewConnections(&[local.port()])).unwrap();
            TcpStream::connect_timeout(&local, Duration::from_millis(100)).unwrap_err();
            // What is there goes on, and so do other ports.
            client.write_all(b"x").unwrap();
            listener.accept().unwrap().0.read_exact(&mut [0]).unwrap();
            TcpStream::connect(free.local_addr().unwrap()).unwrap();
            drop(lock);
            TcpStream::connect(local).unwrap();
        }
    });
}

#[test]
fn diag_lists_what_is_there() {
    in_namespace(|| {
        let (client, server) = connected("127.0.0.1:0");
        let inode = limosa_kernel::net::raw::inode(&client).unwrap();
        let listed = std::thread::spawn(move || {
            // From another namespace, by the socket alone.
            let mut diag = Diag::open_for(&client).unwrap();
            (diag.inet(libc::AF_INET, libc::IPPROTO_TCP).unwrap(), client)
        });
        let (listed, client) = listed.join().unwrap();
        let found = listed.iter().find(|socket| socket.inode == inode).unwrap();
        assert_eq!((found.local, found.remote), tuple(&client));
        assert_eq!(found.state, State::Established as u8);
        drop(server);
    });
}

#[test]
fn a_thousand_connections() {
    in_namespace(|| {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let mut clients = Vec::new();
        let mut servers = Vec::new();
        for number in 0..1_000_u32 {
            let client = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
            let (mut server, _) = listener.accept().unwrap();
            server.write_all(&number.to_be_bytes()).unwrap();
            clients.push(client);
            servers.push(server);
        }
        let lock = PacketLock::new("thousand", Scope::Namespace).unwrap();
        let begin = Instant::now();
        let options: Vec<_> = clients.iter().map(|client| sockopt::capture(client).unwrap()).collect();
        let with_options = begin.elapsed();
        let fds: Vec<_> = clients.iter().map(AsFd::as_fd).collect();
        let begin = Instant::now();
        let snapshots: Vec<_> = tcp_snapshot::take(&fds).unwrap().into_iter().map(Result::unwrap).collect();
        let taken = begin.elapsed();
        for client in &clients {
            abandon(client.as_fd()).unwrap();
        }
        clients.clear();
        let begin = Instant::now();
        let rebuilt: Vec<_> = snapshots
            .iter()
            .zip(&options)
            .map(|(snapshot, options)| {
                rebuild(snapshot, |fd| sockopt::apply(fd, options, Phase::BeforeBind)).unwrap()
            })
            .collect();
        let built = begin.elapsed();
        lock.release();
        let begin = Instant::now();
        for ((rebuilt, snapshot), options) in rebuilt.iter().zip(&snapshots).zip(&options) {
            resume(&rebuilt.socket, snapshot, false).unwrap();
            sockopt::apply(&rebuilt.socket, options, Phase::Last).unwrap();
        }
        println!(
            "1000 connections: options {with_options:?}, snapshots {taken:?}, rebuilding {built:?}, resuming {:?}",
            begin.elapsed()
        );
        for (number, (rebuilt, mut server)) in rebuilt.into_iter().zip(servers).enumerate() {
            let mut client = TcpStream::from(rebuilt.socket);
            let mut got = [0; 4];
            client.read_exact(&mut got).unwrap();
            assert_eq!(u32::from_be_bytes(got), number as u32);
            client.write_all(&got).unwrap();
            server.read_exact(&mut got).unwrap();
            assert!(client.as_raw_fd() > 0);
        }
    });
}
