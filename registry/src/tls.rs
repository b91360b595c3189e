//! Whom TLS trusts and as whom it speaks: certificates from files, for all hosts or for one.

use std::fmt;
use std::path::Path;
use std::sync::Arc;

use rustls::client::ResolvesClientCert;
use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::crypto::{CryptoProvider, ring, verify_tls12_signature, verify_tls13_signature};
use rustls::pki_types::pem::PemObject as _;
use rustls::pki_types::{CertificateDer, PrivateKeyDer, ServerName, UnixTime};
use rustls::sign::CertifiedKey;
use rustls::{ClientConfig, DigitallySignedStruct, RootCertStore, SignatureScheme};
use rustls_platform_verifier::Verifier;
use zeroize::Zeroize as _;

use crate::error::Fault;
use crate::files;
use crate::hosts::TlsFiles;
use crate::limits::MAX_CA_FILE_BYTES;

/// Certificates and what is made of them.
#[derive(Clone, Default)]
pub(crate) struct Trust {
    authorities: Vec<CertificateDer<'static>>,
    identities: Vec<Arc<CertifiedKey>>,
    skip_verify: bool,
}

impl fmt::Debug for Trust {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Trust")
            .field("authorities", &self.authorities.len())
            .field("identities", &self.identities.len())
            .field("skip_verify", &self.skip_verify)
            .finish()
    }
}

impl Trust {
    /// The authorities of a PEM file are trusted besides the system's.
    pub(crate) fn with_authorities(mut self, path: &Path) -> Result<Self, Fault> {
        let found = certificates(path, &read(path)?)?;
        let mut store = RootCertStore::empty();
        for authority in &found {
            store
                .add(authority.clone())
                .map_err(|error| unusable(path, &format!("cannot be used: {error}")))?;
        }
        self.authorities.extend(found);
        Ok(self)
    }

    /// What a host wants, on top of what is trusted anyway.
    pub(crate) fn with_files(mut self, files: &TlsFiles) -> Result<Self, Fault> {
        for path in &files.authorities {
            self = self.with_authorities(path)?;
        }
        for (certificate, key) in &files.identities {
            self.identities.push(Arc::new(identity(certificate, key.as_deref())?));
        }
        self.skip_verify |= files.skip_verify;
        Ok(self)
    }

    /// Whether there is anything to show to a server that asks.
    pub(crate) fn has_identities(&self) -> bool {
        !self.identities.is_empty()
    }

    /// The set-up of connections: with the system's authorities or without, and as somebody or as nobody.
    pub(crate) fn config(&self, system: bool, identified: bool) -> Result<ClientConfig, rustls::Error> {
        let provider = Arc::new(ring::default_provider());
        let builder =
            ClientConfig::builder_with_provider(Arc::clone(&provider)).with_safe_default_protocol_versions()?;
        let builder = if self.skip_verify {
            builder
                .dangerous()
                .with_custom_certificate_verifier(Arc::new(AnyCertificate(provider)))
        } else if system {
            let verifier = Verifier::new_with_extra_roots(self.authorities.iter().cloned(), provider)?;
            builder.dangerous().with_custom_certificate_verifier(Arc::new(verifier))
        } else {
            let mut store = RootCertStore::empty();
            for authority in &self.authorities {
                store.add(authority.clone())?;
            }
            builder.with_root_certificates(store)
        };
        let mut config = if identified && self.has_identities() {
            builder.with_client_cert_resolver(Arc::new(Identities(self.identities.clone())))
        } else {
            builder.with_no_client_auth()
        };
        config.alpn_protocols = vec![b"h2".to_vec(), b"http/1.1".to_vec()];
        Ok(config)
    }
}

fn read(path: &Path) -> Result<Vec<u8>, Fault> {
    files::read(path, MAX_CA_FILE_BYTES).map_err(|source| Fault::File {
        path: path.display().to_string(),
        source,
    })
}

fn certificates(path: &Path, pem: &[u8]) -> Result<Vec<CertificateDer<'static>>, Fault> {
    let found: Result<Vec<_>, _> = CertificateDer::pem_slice_iter(pem).collect();
    let found = found.map_err(|_| unusable(path, "is not a PEM file"))?;
    if found.is_empty() {
        return Err(unusable(path, "holds no certificate"));
    }
    Ok(found)
}

/// A client certificate with its key, which is in the same file if it has none of its own.
fn identity(certificate: &Path, key: Option<&Path>) -> Result<CertifiedKey, Fault> {
    let mut pem = read(certificate)?;
    let chain = certificates(certificate, &pem)?;
    let place = key.unwrap_or(certificate);
    if let Some(key) = key {
        pem.zeroize();
        pem = read(key)?;
    }
    let found = PrivateKeyDer::from_pem_slice(&pem).map_err(|_| unusable(place, "holds no private key"));
    pem.zeroize();
    // The library's words say what kind of key or certificate it cannot use; they quote none.
    CertifiedKey::from_der(chain, found?, &ring::default_provider())
        .map_err(|error| unusable(place, &format!("cannot be used as a client certificate: {error}")))
}

fn unusable(path: &Path, problem: &str) -> Fault {
    Fault::Setup(format!("{} {problem}", path.display()))
}

/// Takes any certificate, as an operator wants who sets `skip_verify`. That the server has its key is checked all the same.
#[derive(Debug)]
struct AnyCertificate(Arc<CryptoProvider>);

impl ServerCertVerifier for AnyCertificate {
    fn verify_server_cert(
        &self,
        _end_entity: &CertificateDer<'_>,
        _intermediates: &[CertificateDer<'_>],
        _server_name: &ServerName<'_>,
        _ocsp_response: &[u8],
        _now: UnixTime,
    ) -> Result<ServerCertVerified, rustls::Error> {
        Ok(ServerCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signed: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        verify_tls12_signature(message, certificate, signed, &self.0.signature_verification_algorithms)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signed: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        verify_tls13_signature(message, certificate, signed, &self.0.signature_verification_algorithms)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.0.signature_verification_algorithms.supported_schemes()
    }
}

/// Shows the first certificate that the server can use: by its kind of signature and by who issued it.
#[derive(Debug)]
struct Identities(Vec<Arc<CertifiedKey>>);

impl ResolvesClientCert for Identities {
    fn resolve(&self, acceptable: &[&[u8]], schemes: &[SignatureScheme]) -> Option<Arc<CertifiedKey>> {
        let fits = |identity: &&Arc<CertifiedKey>| {
            let mut issuers = identity.cert.iter().filter_map(|certificate| issuer(certificate));
            let issued = acceptable.is_empty() || issuers.any(|issuer| acceptable.contains(&issuer));
            issued && identity.key.choose_scheme(schemes).is_some()
        };
        self.0.iter().find(fits).cloned()
    }

    fn has_certs(&self) -> bool {
        !self.0.is_empty()
    }
}

/// The name of a certificate's issuer, as it is encoded.
fn issuer(certificate: &[u8]) -> Option<&[u8]> {
    let body = element(element(certificate)?.content)?.content;
    // A version, which the oldest certificates lack, a serial number, an algorithm, and then the issuer.
    let first = element(body)?;
    let serial = if first.tag == 0xa0 { element(first.rest)? } else { first };
    let algorithm = element(serial.rest)?;
    element(algorithm.rest).map(|issuer| issuer.whole)
}

/// One element of DER.
struct Element<'a> {
    tag: u8,
    content: &'a [u8],
    whole: &'a [u8],
    rest: &'a [u8],
}

fn element(bytes: &[u8]) -> Option<Element<'_>> {
    let (tag, length) = (*bytes.first()?, *bytes.get(1)?);
    let (head, size) = if length < 0x80 {
        (2, usize::from(length))
    } else {
        let digits = bytes.get(2..2 + usize::from(length & 0x7f))?;
        if digits.is_empty() || digits.len() > 4 {
            return None;
        }
        let size = digits.iter().fold(0, |size, digit| (size << 8) | usize::from(*digit));
        (2 + digits.len(), size)
    };
    let end = head.checked_add(size)?;
    Some(Element {
        tag,
        content: bytes.get(head..end)?,
        whole: bytes.get(..end)?,
        rest: bytes.get(end..)?,
    })
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// A certificate of `openssl` and its key in one directory, issued by itself.
    fn certificate(directory: &Path, name: &str) -> (std::path::PathBuf, std::path::PathBuf) {
        let (crt, key) = (
            directory.join(format!("{name}.crt")),
            directory.join(format!("{name}.key")),
        );
        let made = std::process::Command::new("openssl")
            .args([
                "req",
                "-x509",
                "-newkey",
                "ec",
                "-pkeyopt",
                "ec_paramgen_curve:prime256v1",
                "-nodes",
                "-days",
                "2",
            ])
            .args(["-subj", &format!("/O=hullspeed/CN={name}"), "-keyout"])
            .arg(&key)
            .arg("-out")
            .arg(&crt)
            .output()
            .unwrap();
        assert!(made.status.success(), "{made:?}");
        (crt, key)
    }

    #[test]
    fn the_certificate_that_a_server_can_use_is_shown() {
        let directory = tempfile::tempdir().unwrap();
        let (a, b) = (certificate(directory.path(), "a"), certificate(directory.path(), "b"));
        let files = TlsFiles {
            identities: vec![(a.0.clone(), Some(a.1)), (b.0, Some(b.1.clone()))],
            ..TlsFiles::default()
        };
        let trust = Trust::default().with_files(&files).unwrap();
        let own = |at: usize| issuer(&trust.identities[at].cert[0]).unwrap().to_vec();
        assert_ne!(own(0), own(1));
        let identities = Identities(trust.identities.clone());
        let schemes = [SignatureScheme::ECDSA_NISTP256_SHA256];
        let chosen = |acceptable: &[&[u8]], schemes: &[SignatureScheme]| {
            let chosen = identities.resolve(acceptable, schemes)?;
            trust
                .identities
                .iter()
                .position(|identity| Arc::ptr_eq(identity, &chosen))
        };
        assert_eq!(chosen(&[], &schemes), Some(0));
        assert_eq!(chosen(&[&own(1)], &schemes), Some(1));
        assert_eq!(chosen(&[b"\x30\x00"], &schemes), None);
        assert_eq!(chosen(&[], &[SignatureScheme::ED25519]), None);

        // A key of another certificate is found out here and not by the server.
        let files = TlsFiles {
            identities: vec![(a.0.clone(), Some(b.1))],
            ..TlsFiles::default()
        };
        assert!(Trust::default().with_files(&files).is_err());
        let files = TlsFiles {
            identities: vec![(a.0, None)],
            ..TlsFiles::default()
        };
        let error = Trust::default().with_files(&files).unwrap_err();
        assert!(error.to_string().contains("a.crt holds no private key"), "{error}");
    }

    proptest! {
        #[test]
        fn no_bytes_make_the_search_for_an_issuer_panic(bytes in prop::collection::vec(any::<u8>(), 0..64)) {
            let _ = issuer(&bytes);
        }
    }
}
