# Asks the gateway with the session's own token, as a builder that was taken over would.
# Arguments: METHOD TARGET [BODY] ..., three for each request; prints the status of each.
use strict;
use Socket;

open(my $file, "<", "/run/runner/config/auth.json") or die "auth.json: $!";
my ($token) = join("", <$file>) =~ /"auth": *"([^"]+)"/ or die "no token";
$| = 1;

sub ask {
    my ($method, $target, $body, $login) = @_;
    socket(my $tcp, AF_INET, SOCK_STREAM, 0) or die "socket: $!";
    connect($tcp, sockaddr_in(5000, INADDR_LOOPBACK)) or die "connect: $!";
    my $length = length $body;
    syswrite $tcp, "$method $target HTTP/1.1\r\nHost: registry\r\nConnection: close\r\n"
        . "Content-Type: application/vnd.oci.image.manifest.v1+json\r\n"
        . ($login ? "Authorization: Basic $login\r\n" : "")
        . "Content-Length: $length\r\n\r\n$body";
    my $answer = <$tcp>;
    return defined $answer && $answer =~ m{^HTTP/1.1 (\d+)} ? $1 : "closed";
}

print "nobody: ", ask("GET", "/v2/", "", ""), "\n";
print "stranger: ", ask("GET", "/v2/", "", "c2Vzc2lvbjpndWVzc2Vk"), "\n";
while (@ARGV) {
    my ($method, $target, $body) = splice @ARGV, 0, 3;
    print "answer: ", ask($method, $target, $body, $token), " $method $target\n";
}
