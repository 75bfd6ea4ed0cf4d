# The image of docker-compose.yml's own two services, the gateway and MLflow's server.
FROM python:3.13.15-slim

# The same user id as the other images; its folders exist, so that new volumes get this owner.
RUN useradd --uid 10001 --create-home tracelet \
    && install -d -o tracelet -g tracelet /var/lib/tracelet-gateway /var/lib/mlflow

WORKDIR /usr/src/tracelet
COPY pyproject.toml constraints.txt README.md LICENSE ./
COPY tracelet ./tracelet
# psycopg2-binary: MLflow's server on PostgreSQL.
RUN pip install --no-cache-dir --constraint constraints.txt ".[gateway,mlflow]" psycopg2-binary

USER tracelet
WORKDIR /home/tracelet
ENV PYTHONUNBUFFERED=1
CMD ["python", "-m", "tracelet", "gateway", "--help"]
