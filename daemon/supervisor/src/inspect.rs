//! A short-lived runner that reads one header and is thrown away: what comes from strangers is
//! parsed in no process that lives on.

use tokio::time::timeout;
use v4_proto::{
    Fault, Inspection, ModelFiles,
    frame::{FromRunner, ToRunner},
};

use crate::{
    Error, limits,
    link::{FrameReader, FrameWriter, shake_hands},
    process::Launch,
};

/// What the header of these files says.
///
/// # Errors
/// The runner's own fault, or what ended it.
pub(crate) async fn inspect(launch: &Launch, files: ModelFiles) -> Result<Inspection, Fault> {
    let (process, socket) = launch.spawn().map_err(|error| told(&error, ""))?;
    let (read, write) = socket.into_split();
    let mut reader = FrameReader::new(read);
    let writer = FrameWriter::new(write);
    let limit = limits::INSPECT;
    let answer = timeout(limit, ask(&mut reader, &writer, files)).await;
    let answer = answer.unwrap_or(Err(Error::TooLate { what: "read a header", limit }));
    drop((reader, writer));
    match answer {
        Ok(inspection) => {
            // Its end is of no interest, but nobody is left behind as a zombie.
            tokio::spawn(process.end(limits::EXIT));
            Ok(inspection)
        }
        Err(error) => Err(told(&error, &process.end(limits::EXIT).await.last_lines)),
    }
}

async fn ask(
    reader: &mut FrameReader,
    writer: &FrameWriter,
    files: ModelFiles,
) -> Result<Inspection, Error> {
    shake_hands(reader).await?;
    writer.send(&ToRunner::Inspect { files })?;
    loop {
        match reader.next().await? {
            Some(FromRunner::Info { inspection }) => return Ok(*inspection),
            Some(FromRunner::Fatal { fault }) => return Err(Error::Fatal(fault)),
            Some(FromRunner::Progress { .. } | FromRunner::Stats(_)) => {}
            Some(_) => return Err(Error::OutOfPlace("not Info")),
            None => return Err(Error::Ended("before its answer to Inspect".into())),
        }
    }
}

fn told(error: &Error, last_lines: &str) -> Fault {
    let cause = error as &dyn std::error::Error;
    tracing::warn!(error = cause, last_lines, "a model could not be inspected");
    error.fault()
}
