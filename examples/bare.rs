//! The floor that `benches/memory.rs` compares the daemon with: a process that only has what the daemon cannot do
//! without. A zbus connection with a name and an object, a TLS connection verified against the system's roots, and an
//! SQLite database on a thread of its own; then it waits for ever. Built with the flags of the daemon, and without a
//! line of it.
//!
//! `bare BUS-ADDRESS TLS-ADDRESS CA-FILE DIRECTORY`; prints "ready".

use std::{
    env, error::Error, fs::File, future, io::BufReader, io::Write, net::TcpStream, path::Path, sync::mpsc, thread,
};

use rusqlite::Connection;
use rustls::{
    ClientConfig, ClientConnection, RootCertStore, StreamOwned,
    pki_types::{CertificateDer, ServerName, pem::PemObject},
};

type Result<T> = std::result::Result<T, Box<dyn Error + Send + Sync>>;

struct Porter;

#[zbus::interface(name = "org.example.Porter1")]
impl Porter {
    fn hello(&self) -> u32 {
        1
    }
}

fn main() -> Result<()> {
    let args: Vec<String> = env::args().skip(1).collect();
    let [bus, tls, ca_file, dir] = args.as_slice() else {
        return Err("usage: bare BUS-ADDRESS TLS-ADDRESS CA-FILE DIRECTORY".into());
    };
    let _link = connect(tls, ca_file)?;
    let _queue = store(Path::new(dir))?;
    zbus::block_on(async {
        let _bus = zbus::connection::Builder::address(bus.as_str())
            .name("org.example.Porter")
            .serve_at("/org/example/Porter", Porter)
            .build()
            .await?;
        std::io::stdout().write_all(b"ready\n")?;
        future::pending::<()>().await;
        Ok(())
    })
}

fn connect(address: &str, ca_file: &str) -> Result<StreamOwned<ClientConnection, TcpStream>> {
    let mut roots = RootCertStore::empty();
    roots.add_parsable_certificates(rustls_native_certs::load_native_certs().certs);
    for certificate in CertificateDer::pem_reader_iter(BufReader::new(File::open(ca_file)?)) {
        roots.add(certificate?)?;
    }
    let config = ClientConfig::builder_with_provider(rustls::crypto::ring::default_provider().into())
        .with_safe_default_protocol_versions()?
        .with_root_certificates(roots)
        .with_no_client_auth();
    let tcp = TcpStream::connect(address)?;
    let mut stream = StreamOwned::new(ClientConnection::new(config.into(), ServerName::try_from("localhost")?)?, tcp);
    while stream.conn.is_handshaking() {
        stream.conn.complete_io(&mut stream.sock)?;
    }
    Ok(stream)
}

fn store(dir: &Path) -> Result<mpsc::Sender<String>> {
    let database = Connection::open(dir.join("bare.db"))?;
    database.execute_batch(
        "PRAGMA journal_mode = WAL; CREATE TABLE messages (seq INTEGER PRIMARY KEY, body TEXT);
         INSERT INTO messages (body) VALUES ('hello');",
    )?;
    let (queue, receiver) = mpsc::channel::<String>();
    thread::Builder::new().name("store".into()).spawn(move || {
        for body in receiver {
            // Nothing comes; the thread is here for what it costs.
            let _ = database.execute("INSERT INTO messages (body) VALUES (?1)", [body]);
        }
    })?;
    Ok(queue)
}
