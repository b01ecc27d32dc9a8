//! TLS 1.3 between a source that has a ticket and the listener that printed it.
//!
//! The listener's certificate is made for the occasion and pinned by the ticket; names and dates in it mean nothing.
//! After the handshake the source sends 33 bytes: the purpose of the connection (1 to migrate, 2 to ask) and its proof.
//! The listener answers with its own proof, 32 bytes, or hangs up without a word. Then the protocol begins.

use std::io::{self, IoSlice, Read, Write};
use std::net::{TcpStream, ToSocketAddrs};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::crypto::{CryptoProvider, aws_lc_rs};
use rustls::pki_types::{CertificateDer, PrivatePkcs8KeyDer, ServerName, UnixTime};
use rustls::{
    CertificateError, ClientConfig, ClientConnection, Connection, DigitallySignedStruct, ServerConfig,
};
use rustls::{ServerConnection, SignatureScheme};

use crate::address::{ConnectError, authority};
use crate::limits::Limits;
use crate::outcome::Purpose;
use crate::ticket::{PROOF_BYTES, Role, Ticket};
use crate::transport::{FdReceive, FdTransmit, Receive, Stop, Transmit, Transport};

/// Most plain text encrypted in one go, in bytes: sixteen records.
const PLAIN_BYTES: usize = 256 << 10;
/// Most cipher text read in one go, in bytes.
const CIPHER_BYTES: usize = 256 << 10;
const PROTOCOL: &[u8] = b"limosa/1";
const EXPORT_LABEL: &[u8] = b"EXPORTER-limosa-ticket";

/// Connects to a listener.
pub(crate) fn connect(
    host: &str,
    port: u16,
    ticket: &Ticket,
    purpose: Purpose,
    limits: &Limits,
) -> Result<Transport, ConnectError> {
    let until = Instant::now() + limits.connect;
    let address = authority(host, port);
    let socket = connect_tcp(host, port, &address, until)?;
    let failed = |source: io::Error| {
        let pinned = CertificateError::ApplicationVerificationFailure;
        let wrong_key = source
            .get_ref()
            .and_then(|error| error.downcast_ref::<rustls::Error>())
            .is_some_and(|error| *error == rustls::Error::InvalidCertificate(pinned));
        if wrong_key {
            ConnectError::WrongKey { address: address.clone() }
        } else {
            ConnectError::Tls { address: address.clone(), source }
        }
    };
    let connection = client_connection(ticket).map_err(|error| failed(io::Error::other(error)))?;
    let mut session = Session::establish(connection.into(), socket, until).map_err(failed)?;
    let material = session.keying_material().map_err(failed)?;
    let mut first = vec![purpose.to_wire()];
    first.extend_from_slice(ticket.proof(Role::Source, purpose, &material).as_bytes());
    let mut answer = [0; PROOF_BYTES];
    session
        .send(&first, until)
        .and_then(|()| session.fetch(&mut answer, until))
        .map_err(|_| ConnectError::TicketRefused { address: address.clone() })?;
    if blake3::Hash::from_bytes(answer) != ticket.proof(Role::Destination, purpose, &material) {
        return Err(ConnectError::NotProved { address });
    }
    Ok(session.into_transport(address))
}

fn connect_tcp(host: &str, port: u16, address: &str, until: Instant) -> Result<TcpStream, ConnectError> {
    let found = (host, port)
        .to_socket_addrs()
        .map_err(|source| ConnectError::Resolve { host: host.to_owned(), source })?;
    let mut failure = io::Error::from(io::ErrorKind::AddrNotAvailable);
    for one in found {
        match TcpStream::connect_timeout(&one, left(until).max(Duration::from_millis(1))) {
            Ok(socket) => return Ok(socket),
            Err(error) => failure = error,
        }
    }
    Err(ConnectError::Tcp { address: address.to_owned(), source: failure })
}

fn left(until: Instant) -> Duration {
    until.saturating_duration_since(Instant::now())
}

/// The key and certificate of one listener.
pub(crate) struct Identity {
    config: Arc<ServerConfig>,
    certificate: CertificateDer<'static>,
    /// PKCS #8.
    key: Vec<u8>,
}

impl Identity {
    /// A new key (ECDSA on P-256) with a certificate signed by itself.
    pub(crate) fn generate() -> io::Result<Self> {
        let made = rcgen::generate_simple_self_signed(vec!["limosa".to_owned()]).map_err(io::Error::other)?;
        Self::of(made.cert.der().to_vec(), made.signing_key.serialize_der())
    }

    /// That of another process: its certificate (DER) and its key (PKCS #8).
    pub(crate) fn of(certificate: Vec<u8>, key: Vec<u8>) -> io::Result<Self> {
        let certificate = CertificateDer::from(certificate);
        let mut config = ServerConfig::builder_with_provider(provider())
            .with_protocol_versions(&[&rustls::version::TLS13])
            .map_err(io::Error::other)?
            .with_no_client_auth()
            .with_single_cert(vec![certificate.clone()], PrivatePkcs8KeyDer::from(key.clone()).into())
            .map_err(io::Error::other)?;
        config.alpn_protocols = vec![PROTOCOL.to_vec()];
        // Every connection proves itself anew.
        config.send_tls13_tickets = 0;
        config.session_storage = Arc::new(rustls::server::NoServerSessionStorage {});
        Ok(Self { config: Arc::new(config), certificate, key })
    }

    /// The key, PKCS #8: a secret.
    pub(crate) fn key(&self) -> &[u8] {
        &self.key
    }

    /// The certificate, DER.
    pub(crate) fn certificate(&self) -> &[u8] {
        &self.certificate
    }

    /// The listener's side of a new connection, up to where the source's proof is checked.
    pub(crate) fn accept(&self, socket: TcpStream, ticket: &Ticket, until: Instant) -> io::Result<Caller> {
        let connection = ServerConnection::new(Arc::clone(&self.config)).map_err(io::Error::other)?;
        let mut session = Session::establish(connection.into(), socket, until)?;
        let material = session.keying_material()?;
        let mut first = [0; 1 + PROOF_BYTES];
        session.fetch(&mut first, until)?;
        let [purpose, proof @ ..] = first;
        let purpose = Purpose::from_wire(purpose);
        // Constant time: blake3::Hash compares so.
        let good = purpose.filter(|purpose| {
            blake3::Hash::from_bytes(proof) == ticket.proof(Role::Source, *purpose, &material)
        });
        Ok(match good {
            Some(purpose) => {
                let answer = ticket.proof(Role::Destination, purpose, &material);
                Caller::Proved(purpose, Proved { session, answer })
            }
            None => Caller::Stranger,
        })
    }
}

/// Who called.
pub(crate) enum Caller {
    /// Someone without the ticket's secret.
    Stranger,
    /// The one with the ticket; not answered yet.
    Proved(Purpose, Proved),
}

/// A source that proved that it has the ticket.
pub(crate) struct Proved {
    session: Session,
    answer: blake3::Hash,
}

impl Proved {
    /// Proves this side too; then the protocol can begin.
    pub(crate) fn welcome(mut self, name: String, until: Instant) -> io::Result<Transport> {
        self.session.send(self.answer.as_bytes(), until)?;
        Ok(self.session.into_transport(name))
    }
}

fn provider() -> Arc<CryptoProvider> {
    Arc::new(aws_lc_rs::default_provider())
}

fn client_connection(ticket: &Ticket) -> Result<ClientConnection, rustls::Error> {
    let provider = provider();
    let verifier = Pinned { ticket: ticket.clone(), provider: Arc::clone(&provider) };
    let mut config = ClientConfig::builder_with_provider(provider)
        .with_protocol_versions(&[&rustls::version::TLS13])?
        .dangerous()
        .with_custom_certificate_verifier(Arc::new(verifier))
        .with_no_client_auth();
    config.alpn_protocols = vec![PROTOCOL.to_vec()];
    config.enable_sni = false;
    config.resumption = rustls::client::Resumption::disabled();
    let name = ServerName::try_from("limosa").map_err(|error| rustls::Error::General(error.to_string()))?;
    ClientConnection::new(Arc::new(config), name)
}

/// Accepts the one certificate whose hash is in the ticket, and checks that the listener has its key.
#[derive(Debug)]
struct Pinned {
    ticket: Ticket,
    provider: Arc<CryptoProvider>,
}

impl ServerCertVerifier for Pinned {
    fn verify_server_cert(
        &self,
        certificate: &CertificateDer<'_>,
        _others: &[CertificateDer<'_>],
        _name: &ServerName<'_>,
        _ocsp: &[u8],
        _now: UnixTime,
    ) -> Result<ServerCertVerified, rustls::Error> {
        if self.ticket.pins(certificate) {
            Ok(ServerCertVerified::assertion())
        } else {
            Err(rustls::Error::InvalidCertificate(CertificateError::ApplicationVerificationFailure))
        }
    }

    fn verify_tls12_signature(
        &self,
        _message: &[u8],
        _certificate: &CertificateDer<'_>,
        _signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        Err(rustls::Error::PeerIncompatible(rustls::PeerIncompatible::Tls13RequiredForQuic))
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        let algorithms = &self.provider.signature_verification_algorithms;
        rustls::crypto::verify_tls13_signature(message, certificate, signature, algorithms)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.provider.signature_verification_algorithms.supported_schemes()
    }
}

/// An established TLS connection.
struct Session {
    receive: TlsReceive,
    transmit: TlsTransmit,
    stop: Stop,
}

impl Session {
    fn establish(mut connection: Connection, socket: TcpStream, until: Instant) -> io::Result<Self> {
        let stop = Stop::new()?;
        let (mut input, mut output) = Transport::tcp_halves(socket, &stop)?;
        let mut cipher = vec![0; CIPHER_BYTES];
        let mut shake = || -> io::Result<()> {
            while connection.is_handshaking() || connection.wants_write() {
                flush(&mut connection, &mut output, until)?;
                if connection.is_handshaking() {
                    let length = input.receive(&mut cipher, left(until))?;
                    if length == 0 {
                        return Err(io::ErrorKind::UnexpectedEof.into());
                    }
                    let result = digest(&mut connection, cipher.get(..length).unwrap_or_default());
                    if result.is_err() {
                        // The alert that tells the other side; it may be gone.
                        let _ = flush(&mut connection, &mut output, until);
                    }
                    result?;
                }
            }
            Ok(())
        };
        shake()?;
        connection.set_buffer_limit(None);
        let connection = Arc::new(Mutex::new(connection));
        Ok(Self {
            receive: TlsReceive { socket: input, connection: Arc::clone(&connection), cipher, pending: 0..0 },
            transmit: TlsTransmit { socket: output, connection, cipher: Vec::new() },
            stop,
        })
    }

    fn keying_material(&self) -> io::Result<[u8; 32]> {
        lock(&self.receive.connection)
            .export_keying_material([0; 32], EXPORT_LABEL, None)
            .map_err(io::Error::other)
    }

    fn send(&mut self, bytes: &[u8], until: Instant) -> io::Result<()> {
        let mut rest = bytes;
        while !rest.is_empty() {
            let sent = self.transmit.transmit(&[IoSlice::new(rest)], left(until))?;
            rest = rest.get(sent..).unwrap_or_default();
        }
        Ok(())
    }

    fn fetch(&mut self, bytes: &mut [u8], until: Instant) -> io::Result<()> {
        let mut have = 0;
        while let Some(rest) = bytes.get_mut(have..).filter(|rest| !rest.is_empty()) {
            match self.receive.receive(rest, left(until))? {
                0 => return Err(io::ErrorKind::UnexpectedEof.into()),
                more => have += more,
            }
        }
        Ok(())
    }

    fn into_transport(self, name: String) -> Transport {
        Transport {
            receive: Box::new(self.receive),
            transmit: Box::new(self.transmit),
            stop: self.stop,
            name,
            carrier: None,
        }
    }
}

fn lock(connection: &Mutex<Connection>) -> MutexGuard<'_, Connection> {
    connection.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Sends what the connection wants to send, during the handshake.
fn flush(connection: &mut Connection, output: &mut FdTransmit, until: Instant) -> io::Result<()> {
    let mut cipher = Vec::new();
    while connection.wants_write() {
        connection.write_tls(&mut cipher)?;
    }
    send_all(output, &cipher, || left(until))
}

fn send_all(output: &mut FdTransmit, bytes: &[u8], within: impl Fn() -> Duration) -> io::Result<()> {
    let mut rest = bytes;
    while !rest.is_empty() {
        let sent = output.transmit(&[IoSlice::new(rest)], within())?;
        rest = rest.get(sent..).unwrap_or_default();
    }
    Ok(())
}

/// Gives cipher text to the connection.
fn digest(connection: &mut Connection, cipher: &[u8]) -> io::Result<()> {
    let mut rest = cipher;
    while !rest.is_empty() {
        connection.read_tls(&mut rest)?;
        connection.process_new_packets().map_err(io::Error::other)?;
    }
    Ok(())
}

/// The receiving half. Waits without holding the connection, so that the other half can send meanwhile.
struct TlsReceive {
    socket: FdReceive,
    connection: Arc<Mutex<Connection>>,
    cipher: Vec<u8>,
    pending: std::ops::Range<usize>,
}

impl Receive for TlsReceive {
    fn receive(&mut self, buffer: &mut [u8], within: Duration) -> io::Result<usize> {
        loop {
            let mut connection = lock(&self.connection);
            match connection.reader().read(buffer) {
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                result => return result,
            }
            let mut rest = self.cipher.get(self.pending.clone()).unwrap_or_default();
            if !rest.is_empty() {
                self.pending.start += connection.read_tls(&mut rest)?;
                connection.process_new_packets().map_err(io::Error::other)?;
                continue;
            }
            drop(connection);
            match self.socket.receive(&mut self.cipher, within)? {
                // An end that TLS did not announce is a cut, and so is one that it did: the protocol has its own.
                0 => return Ok(0),
                length => self.pending = 0..length,
            }
        }
    }
}

/// The sending half. Only one thread sends at a time (`Link` sees to it), so records leave in the order they were made.
struct TlsTransmit {
    socket: FdTransmit,
    connection: Arc<Mutex<Connection>>,
    cipher: Vec<u8>,
}

impl TlsTransmit {
    fn encrypt(&mut self, parts: &[IoSlice<'_>]) -> io::Result<usize> {
        let mut connection = lock(&self.connection);
        let mut taken = 0;
        for part in parts {
            let part = part.get(..part.len().min(PLAIN_BYTES - taken)).unwrap_or_default();
            connection.writer().write_all(part)?;
            taken += part.len();
        }
        self.cipher.clear();
        while connection.wants_write() {
            connection.write_tls(&mut self.cipher)?;
        }
        Ok(taken)
    }
}

impl Transmit for TlsTransmit {
    fn transmit(&mut self, parts: &[IoSlice<'_>], within: Duration) -> io::Result<usize> {
        let taken = self.encrypt(parts)?;
        send_all(&mut self.socket, &self.cipher, || within)?;
        Ok(taken)
    }

    fn finish(&mut self, within: Duration) -> io::Result<()> {
        lock(&self.connection).send_close_notify();
        self.encrypt(&[])?;
        send_all(&mut self.socket, &self.cipher, || within)?;
        self.socket.finish(within)
    }
}
