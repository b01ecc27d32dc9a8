//! Servers whose clients connect, or wait to be accepted, while a checkpoint is made.

use std::io::{ErrorKind, Read, Write};
use std::net::{Ipv4Addr, TcpStream};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use limosa_e2e::contained::Contained;
use limosa_e2e::ground::Ground as _;
use limosa_e2e::limosa::{self, Source};
use limosa_e2e::sandbox::{Sandbox, sandboxed, wait_until_alone};
use limosa_e2e::target::Target;

/// What one client does until it is told to stop: a connection for each line.
fn connect_again_and_again(port: u16, stop: &AtomicBool) -> Result<u64> {
    let mut done = 0;
    while !stop.load(Ordering::Relaxed) {
        let mut stream = match TcpStream::connect((Ipv4Addr::LOCALHOST, port)) {
            Ok(stream) => stream,
            // Between the end of the source and the restore nobody listens.
            Err(error) if error.kind() == ErrorKind::ConnectionRefused => {
                std::thread::sleep(Duration::from_millis(2));
                continue;
            }
            Err(error) => return Err(error).context("connecting"),
        };
        stream.set_read_timeout(Some(Duration::from_secs(20)))?;
        let line = format!("line {done}\n");
        stream.write_all(line.as_bytes()).context("asking")?;
        let mut answer = String::new();
        stream.read_to_string(&mut answer).context("waiting for an answer")?;
        ensure!(answer == line, "{answer:?} came for {line:?}");
        done += 1;
    }
    Ok(done)
}

fn port_of(sandbox: &Sandbox) -> Result<u16> {
    Ok(std::fs::read_to_string(sandbox.path("server.port"))?.parse()?)
}

/// A listening socket nearly always has connections in it that wait to be accepted. None is lost or reset.
fn constant_connects(sandbox: &Sandbox) -> Result<()> {
    let server = Target::start(sandbox, "server", &[])?;
    let (port, stop) = (port_of(sandbox)?, AtomicBool::new(false));
    std::thread::scope(|scope| -> Result<()> {
        let clients: Vec<_> = (0..4).map(|_| scope.spawn(|| connect_again_and_again(port, &stop))).collect();
        let checkpoints = || -> Result<()> {
            for round in 0..6 {
                let (out, ends) = (sandbox.path(&format!("round-{round}")), round > 3);
                // Whoever connects to a source that is about to end tries again after a second.
                std::thread::sleep(Duration::from_millis(if round > 4 { 1_500 } else { 100 }));
                let source = if ends { Source::Ends } else { Source::GoesOn };
                limosa::checkpoint(sandbox, server.root(), &out, source, &[])?.success("checkpoint")?;
                if ends {
                    wait_until_alone()?;
                    limosa::restore(sandbox, &out, &[])?;
                }
                server.verify()?;
            }
            Ok(())
        };
        let outcome = checkpoints();
        stop.store(true, Ordering::Relaxed);
        for client in clients {
            let done = client.join().expect("a client panicked").context("a client")?;
            ensure!(outcome.is_err() || done > 50, "a client had {done} connections only");
            println!("{done} connections");
        }
        outcome
    })?;
    sandbox.end_all()
}

#[test]
#[expect(clippy::redundant_closure, reason = "the sandbox finds the test by the name of its closure")]
fn no_connection_to_a_busy_server_is_lost() {
    sandboxed(|sandbox| constant_connects(sandbox));
}

/// A server that never accepts is refused after a moment, and its clients notice nothing; given up, they are told.
fn a_deaf_server(sandbox: &Sandbox) -> Result<()> {
    let server = Target::start(sandbox, "server", &["deaf"])?;
    let port = port_of(sandbox)?;
    let mut client = TcpStream::connect((Ipv4Addr::LOCALHOST, port))?;
    client.write_all(b"hello\n")?;
    client.set_read_timeout(Some(Duration::from_millis(100)))?;
    let out = sandbox.path("out");
    let said = limosa::checkpoint(sandbox, server.root(), &out, Source::Ends, &[])?;
    ensure!(said.status == Some(1) && said.err.contains("--unaccepted close"), "{said:?}");
    let waits = |client: &mut TcpStream| client.read(&mut [0]).map_err(|error| error.kind());
    ensure!(waits(&mut client) == Err(ErrorKind::WouldBlock), "the client noticed a refused checkpoint");
    let give_up = ["--unaccepted", "close"];
    limosa::checkpoint(sandbox, server.root(), &sandbox.path("kept"), Source::GoesOn, &give_up)?
        .success("checkpoint")?;
    ensure!(waits(&mut client) == Err(ErrorKind::WouldBlock), "the client noticed a checkpoint");
    limosa::checkpoint(sandbox, server.root(), &out, Source::Ends, &give_up)?.success("checkpoint")?;
    ensure!(waits(&mut client) == Err(ErrorKind::ConnectionReset), "the client was not told");
    wait_until_alone()?;
    limosa::restore(sandbox, &out, &[])?;
    server.verify()?;
    TcpStream::connect((Ipv4Addr::LOCALHOST, port)).context("connecting to the restored server")?;
    server.quit()?;
    sandbox.end_all()
}

#[test]
#[expect(clippy::redundant_closure, reason = "the sandbox finds the test by the name of its closure")]
fn connections_that_nobody_accepts_are_given_up_on_request() {
    sandboxed(|sandbox| a_deaf_server(sandbox));
}

/// A container whose program never accepts stays where it is, unless its connections are given up.
fn a_deaf_container(sandbox: &Sandbox) -> Result<()> {
    let container = Contained::new(sandbox)?;
    let server = Target::start(&container, "server", &["deaf"])?;
    let port = std::fs::read_to_string(container.seen(&container.directory().join("server.port")))?;
    let address = (container.address(), port.parse()?);
    let connect = || -> Result<TcpStream> {
        let _there = container.among_clients()?;
        TcpStream::connect(address).context("connecting")
    };
    let mut client = connect()?;
    client.write_all(b"hello\n")?;
    let refused = container.migrate_by(&[]).map_err(|error| format!("{error:#}"));
    ensure!(refused.as_ref().is_err_and(|why| why.contains("--unaccepted close")), "{refused:?}");
    client.set_read_timeout(Some(Duration::from_millis(100)))?;
    let waits = client.read(&mut [0]).map_err(|error| error.kind());
    ensure!(waits == Err(ErrorKind::WouldBlock), "the client noticed a refused migration: {waits:?}");

    container.migrate_by(&["--unaccepted", "close"])?;
    server.verify()?;
    client.write_all(b"are you there?\n")?;
    client.set_read_timeout(Some(Duration::from_secs(10)))?;
    let told = client.read(&mut [0]).map_err(|error| error.kind());
    ensure!(told == Err(ErrorKind::ConnectionReset), "the client was not told: {told:?}");
    connect().context("at the other host")?;
    container.end()
}

#[test]
#[expect(clippy::redundant_closure, reason = "the sandbox finds the test by the name of its closure")]
fn a_migration_gives_up_connections_that_nobody_accepts_on_request() {
    sandboxed(|sandbox| a_deaf_container(sandbox));
}
